"""A pipeline made of another one and of what training has written."""

from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .pipeline_loading import locate
from .trained_parts import IMAGE_TOKENIZER, PARTS, is_adapter, merge_into_pipeline, parts_in


if TYPE_CHECKING:
    import torch

    from diffusers_llada_uni import LLaDAUniPipeline


ORDER = {"model": 0, "image_tokenizer": 2, "adapter": 3}  # all else between


def assemble(trained: Sequence[Path], into: str | None, output: Path) -> list[str]:
    """
    Writes a pipeline's folder. Each part keeps the type of numbers that it is stored in; the processor is that of
    `into`.

    Args:
        trained: What stages of training have written: the folder of a language model, of an
            adapter, or one with folders of other parts (`transformer/`, `vae/`, `image_tokenizer/`, ...) in it.
        into: The pipeline that has all other parts. Default: the one that the first adapter was trained upon.
        output: The folder to write.

    Returns:
        The names of the parts that are new.

    Raises:
        ValueError: if a folder holds nothing that has been trained, does not fit, or `into` is missing.
        FileExistsError: if there is an `output`.
    """
    for folder in trained:
        if not parts_in(folder):
            raise ValueError(f"`trained`: {str(folder)!r} holds no part of a pipeline, as training writes it.")
    if output.exists():
        raise FileExistsError(f"`output`: {str(output)!r} exists already.")
    if into is None:
        adapter = next((folder for folder in trained if is_adapter(folder)), None)
        if adapter is None:
            raise ValueError("`into` is missing: the pipeline that has all other parts, such as `emoji`.")
        into = locate(str(adapter)).path
    pipe = _load_as_stored(into)
    found = [(name, folder) for folder in trained for name in parts_in(folder)]
    found.sort(key=lambda part: ORDER.get(part[0], 1))  # else a model would replace what was put into it
    for name, folder in found:
        _put(name, folder, pipe)
    from transformers_llada_uni.loading.folder_writing import folder_at_once

    with folder_at_once(output) as folder:
        pipe.save_pretrained(folder)
    return [name for name, _ in found]


def _load_as_stored(name: str) -> "LLaDAUniPipeline":
    import torch

    from diffusers_llada_uni import LLaDAUniPipeline

    located = locate(name)
    if not located.is_pipeline or located.adapter is not None:
        raise ValueError(f"`into` {name!r} is no pipeline.")
    if not Path(located.path).is_dir():
        from huggingface_hub import snapshot_download

        located = located._replace(path=snapshot_download(located.path))
    dtypes = {part.name: _stored_dtype(part) for part in Path(located.path).iterdir() if part.is_dir()}
    known = {part: dtype for part, dtype in dtypes.items() if dtype is not None}
    return LLaDAUniPipeline.from_pretrained(located.path, dtype={**known, "default": torch.float32})


def _stored_dtype(folder: Path) -> "torch.dtype | None":
    """Of the largest weight in a folder, since some small ones stay in float32; `None` if there are none."""
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            largest = max(tensors.keys(), key=lambda name: prod(tensors.get_slice(name).get_shape()))
            return tensors.get_tensor(largest).dtype
    return None


def _put(name: str, folder: Path, pipe: "LLaDAUniPipeline") -> None:
    """Takes a part that a folder holds into the pipeline; an adapter is added to the weights there."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel

    from diffusers_llada_uni import LLaDAUniSemanticEmbedder
    from transformers_llada_uni import LLaDAUniForConditionalGeneration
    from transformers_llada_uni.loading.model_loading import load_model

    classes: dict[str, Any] = {
        "vae": AutoencoderKL,
        "semantic_embedder": LLaDAUniSemanticEmbedder,
        "transformer": ZImageTransformer2DModel,
        "transformer_turbo": ZImageTransformer2DModel,
    }
    if name in classes:
        own = classes[name].from_pretrained(folder / name, dtype=_stored_dtype(folder / name))
        pipe.register_modules(**{name: own})
    elif name in PARTS:
        pipe.register_modules(**{name: FlowMatchEulerDiscreteScheduler.from_pretrained(folder / name)})
    elif name == "image_tokenizer":
        put_image_tokenizer(folder / IMAGE_TOKENIZER, pipe.model)
    elif name == "adapter":
        merge_into_pipeline(pipe, str(folder))
    else:
        model = load_model(str(folder), dtype="auto")
        if not isinstance(model, LLaDAUniForConditionalGeneration):
            raise ValueError(f"`trained`: {str(folder)!r} is a model of text alone, with no place in a pipeline.")
        pipe.register_modules(model=model)


def put_image_tokenizer(file: Path, model: Any) -> None:
    """Gives a model the image tokenizer that training has written. Raises ValueError, if it does not fit."""
    from safetensors.torch import load_file

    try:
        missing, unexpected = model.load_state_dict(load_file(file), strict=False)
    except RuntimeError as error:
        raise ValueError(f"`trained`: {str(file)!r} does not fit the model: {error}") from error
    own = [name for name in missing if is_of_image_tokenizer(name)]
    if own or unexpected:
        raise ValueError(f"`trained`: {str(file)!r} does not fit the model: missing {own}, unknown {unexpected}.")


def is_of_image_tokenizer(name: str) -> bool:
    """Whether a weight of the model is."""
    return ".visual." in name or ".vqmodel." in name
