"""A LoRA adapter that is named in the place of a model: the model that it was trained upon, and the two made one."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .json_files import read_object


if TYPE_CHECKING:
    from diffusers_llada_uni import LLaDAUniPipeline

CONFIG = "adapter_config.json"  # peft's
OF_A_DECODER = "pytorch_lora_weights.safetensors"  # diffusers', which does not say upon what it stands


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG).is_file() or (folder / OF_A_DECODER).is_file()


def base_of_adapter(name: str, folder: Path) -> str:
    """
    The model that the adapter in a folder was trained upon: of a pipeline's language model the pipeline.

    Args:
        name: As it was typed, for errors.
        folder: Of the adapter. One that names no model stands upon the pipeline that it lies in.

    Raises:
        ValueError: if it does not say so.
    """
    base = read_object(folder / CONFIG).get("base_model_name_or_path") if (folder / CONFIG).is_file() else None
    if base is None and _is_pipeline(folder.resolve().parent):
        base = str(folder.resolve().parent)
    if not isinstance(base, str) or not base:
        raise ValueError(
            f"`model` {name!r} is an adapter (LoRA) that does not say upon which model it stands: make one model of "
            "the two, as docs/own-images.md shows in 'Keep it as a model', and name that."
        )
    path = Path(base).expanduser()
    return str(path.parent) if _is_pipeline(path.parent) else base


def merge_into_pipeline(pipe: "LLaDAUniPipeline", adapter: str) -> None:
    """Adds what an adapter (a folder or a repository) has learnt to the weights of the language model."""
    pipe.load_lora_weights(adapter)
    pipe.fuse_lora()
    pipe.unload_lora_weights()


def merged(model: Any, adapter: str) -> Any:
    """A language model with what an adapter has learnt in its weights."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, adapter).merge_and_unload()


def _is_pipeline(folder: Path) -> bool:
    return (folder / "model_index.json").is_file()
