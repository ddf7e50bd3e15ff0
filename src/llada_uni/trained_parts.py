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


def is_pipeline_folder(folder: Path) -> bool:
    return (folder / "model_index.json").is_file()


def is_adapter(folder: Path) -> bool:
    is_one = (folder / CONFIG).is_file() or (folder / OF_A_DECODER).is_file()
    return is_one and not is_pipeline_folder(folder)


def parts_in(folder: Path) -> list[str]:
    """What training has written into a folder; nothing, if it is a pipeline."""
    if is_pipeline_folder(folder):
        return []
    found = [name for name in PARTS if (folder / name).is_dir()]
    if (folder / IMAGE_TOKENIZER).is_file():
        found.append("image_tokenizer")
    if is_adapter(folder):
        found.append("adapter")
    elif (folder / "config.json").is_file() and "model_type" in read_object(folder / "config.json"):
        found.append("model")
    return found


def base_of_adapter(name: str, folder: Path) -> str:
    """
    The model that the adapter in a folder was trained upon: of a pipeline's language model the pipeline.

    Args:
        name: As it was typed, for errors.
        folder: Of the adapter. One that names no model stands upon the pipeline that it lies in.

    Raises:
        ValueError: if it does not say so.
    """
    if not (folder / CONFIG).is_file():
        raise ValueError(
            f"`model` {name!r} is an adapter (LoRA) of a decoder, which does not say upon which model it stands: "
            "`llada-uni assemble FOLDER --into PIPELINE --output NEW` makes one model of both."
        )
    base = read_object(folder / CONFIG).get("base_model_name_or_path")
    if base is None and is_pipeline_folder(folder.resolve().parent):
        base = str(folder.resolve().parent)
    if not isinstance(base, str) or not base:
        raise ValueError(
            f"`model` {name!r} is an adapter (LoRA) that does not say upon which model it stands: write the model's "
            f"folder or repository into its {CONFIG}, as `base_model_name_or_path`."
        )
    path = Path(base).expanduser()
    pipeline = path.parent if path.name == "model" else path
    # What comes along may lie elsewhere than on the machine of the training.
    if pipeline.parts[-3:-1] == ("diffusers_llada_uni", "checkpoints") and not pipeline.exists():
        return pipeline.name
    return str(pipeline) if is_pipeline_folder(pipeline) else base


def merge_into_pipeline(pipe: "LLaDAUniPipeline", adapter: str) -> None:
    """Adds what an adapter (a path or a repository) has learnt to the weights of what it was trained upon."""
    if Path(adapter).exists() and not Path(adapter, CONFIG).is_file():
        pipe.load_lora_weights(adapter)  # of a decoder
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    else:
        pipe.register_modules(model=merged(pipe.model, adapter))


def merged(model: Any, adapter: str) -> Any:
    """
    A language model with what an adapter has learnt in its weights.

    Raises:
        ValueError: if these are quantised.
    """
    from transformers_llada_uni.optional_dependencies import require_extra

    require_extra("train", "peft")
    from peft import PeftModel

    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(
            f"The adapter {adapter!r} cannot be added to quantised weights: name the model as it was before as its "
            "`base_model_name_or_path`."
        )
    return PeftModel.from_pretrained(model, adapter).merge_and_unload()
