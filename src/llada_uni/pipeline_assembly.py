"""A pipeline made of another one and of what training has written."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .pipeline_loading import locate
from .trained_parts import IMAGE_TOKENIZER, PARTS, is_adapter, merge_into_pipeline, parts_in


if TYPE_CHECKING:
    from diffusers_llada_uni import LLaDAUniPipeline


def assemble(trained: Sequence[Path], into: str | None, output: Path) -> list[str]:
    """
    Writes a pipeline's folder.

    Args:
        trained: What stages of training have written, the later ones last: the folder of a language model, of an
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
    new = [part for folder in trained for part in _put(folder, pipe)]
    from transformers_llada_uni.loading.folder_writing import folder_at_once

    with folder_at_once(output) as folder:
        pipe.save_pretrained(folder)
    return new


def _load_as_stored(name: str) -> "LLaDAUniPipeline":
    import torch
    from transformers import AutoConfig

    from diffusers_llada_uni import LLaDAUniPipeline

    located = locate(name)
    if not located.is_pipeline or located.adapter is not None:
        raise ValueError(f"`into` {name!r} is no pipeline.")
    config = AutoConfig.from_pretrained(located.path, subfolder="model")
    return LLaDAUniPipeline.from_pretrained(located.path, dtype=config.dtype or torch.float32)


def _put(folder: Path, pipe: "LLaDAUniPipeline") -> list[str]:
    """Takes what a folder holds into the pipeline; an adapter is added to the weights of its language model."""
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
    found = parts_in(folder)
    for name in found:
        if name in classes:
            pipe.register_modules(**{name: classes[name].from_pretrained(folder / name, dtype=pipe.dtype)})
        elif name in PARTS:
            pipe.register_modules(**{name: FlowMatchEulerDiscreteScheduler.from_pretrained(folder / name)})
        elif name == "image_tokenizer":
            _put_image_tokenizer(folder / IMAGE_TOKENIZER, pipe.model)
        elif name == "adapter":
            merge_into_pipeline(pipe, str(folder))
        else:
            model = load_model(str(folder), dtype=pipe.dtype)
            if not isinstance(model, LLaDAUniForConditionalGeneration):
                raise ValueError(f"`trained`: {str(folder)!r} is a model of text alone, with no place in a pipeline.")
            pipe.register_modules(model=model)
    return found


def _put_image_tokenizer(file: Path, model: Any) -> None:
    from safetensors.torch import load_file

    missing, unexpected = model.load_state_dict(load_file(file), strict=False)
    own = [name for name in missing if ".visual." in name or ".vqmodel." in name]
    if own or unexpected:
        raise ValueError(f"`trained`: {str(file)!r} does not fit the model: missing {own}, unknown {unexpected}.")
