"""
Folders that training has written: parts of a pipeline, and LoRA adapters, which may be named in the place of a model;
the model that one was trained upon, and the two made one.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .json_files import read_object


if TYPE_CHECKING:
    from diffusers_llada_uni import LLaDAUniPipeline

CONFIG = "adapter_config.json"  # peft's
OF_A_DECODER = "pytorch_lora_weights.safetensors"  # diffusers', which does not say upon what it stands
PARTS = ("vae", "semantic_embedder", "transformer", "scheduler", "transformer_turbo", "scheduler_turbo")
IMAGE_TOKENIZER = Path("image_tokenizer", "image_tokenizer.safetensors")


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG).is_file() or (folder / OF_A_DECODER).is_file()


def parts_in(folder: Path) -> list[str]:
    """What training has written into a folder."""
    found = [name for name in PARTS if (folder / name).is_dir()]
    if (folder / IMAGE_TOKENIZER).is_file():
        found.append("image_tokenizer")
    if is_adapter(folder):
        found.append("adapter")
    elif (folder / "config.json").is_file():
        found.append("model")
    return [] if (folder / "model_index.json").is_file() else found


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
            f"`model` {name!r} is an adapter (LoRA) that does not say upon which model it stands: write the model's "
            f"folder or repository into its {CONFIG}, as `base_model_name_or_path`."
        )
    path = Path(base).expanduser()
    if path.name == "model" and (_is_pipeline(path.parent) or not path.exists()):
        path = path.parent
        base = str(path)
    # What comes along may lie elsewhere than on the machine of the training.
    is_embedded = path.parts[-3:-1] == ("diffusers_llada_uni", "checkpoints")
    return path.name if is_embedded and not path.exists() else base


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
