"""The model and the processor of a name, whichever of the layouts it has."""

import os
from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.distributed import DistributedConfig
from transformers.utils import cached_file


# The Auto class of the model with a head, by model type
AUTO_CLASSES = {"llada_uni": AutoModelForMultimodalLM, "llada2_moe": AutoModelForCausalLM}


def _has_file(name_or_path: str, file: str, **location: Any) -> bool:
    return cached_file(name_or_path, file, _raise_exceptions_for_missing_entries=False, **location) is not None


def _part_of_pipeline(name_or_path: str, part: str, revision: str | None) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` is given for a part of a pipeline; for `name_or_path` itself if that is no pipeline."""
    if not _has_file(name_or_path, "model_index.json", revision=revision):
        return name_or_path, {"revision": revision}
    if os.path.isdir(name_or_path):
        return os.path.join(name_or_path, part), {}  # adapters and cards name the model by this path
    return name_or_path, {"revision": revision, "subfolder": part}


def quantization_of(name_or_path: str, revision: str | None = None) -> str | None:
    """The `quant_method` in which the weights of a model that [`load_model`] takes are stored, or `None`."""
    name_or_path, location = _part_of_pipeline(name_or_path, "model", revision)
    settings = PreTrainedConfig.get_config_dict(name_or_path, **location)[0].get("quantization_config") or {}
    return settings.get("quant_method")


def load_model(name_or_path: str, revision: str | None = None, **settings: Any) -> PreTrainedModel:
    """
    A language model from a pipeline's folder or repository, from its `model/`, or from the released layout.

    Args:
        name_or_path (`str`): A folder, or a repository of the Hub.
        revision (`str`, *optional*): Of the repository.
        **settings: For `from_pretrained`; `distributed_config` may be a dict, as it is in a configuration file, and
            the name of an `attn_implementation` is that of the language model: the image tokenizer has fewer.

    Returns:
        [`LLaDAUniForConditionalGeneration`], or [`LLaDA2MoeForBlockDiffusion`] for the backbone alone.

    Raises:
        ValueError: for a model of another type.
    """
    name_or_path, location = _part_of_pipeline(name_or_path, "model", revision)
    if isinstance(settings.get("distributed_config"), dict):
        settings["distributed_config"] = DistributedConfig(**settings["distributed_config"])
    # Of another type, Auto classes would ask whether to run the code that it comes with.
    model_type = PreTrainedConfig.get_config_dict(name_or_path, **location)[0].get("model_type")
    if model_type not in AUTO_CLASSES:
        is_autoregressive = str(model_type).startswith("bailing")
        hint = " `llada-uni convert` makes one to train of it." if is_autoregressive else ""
        raise ValueError(f"{name_or_path!r} holds a model of type {model_type!r}, not {list(AUTO_CLASSES)}.{hint}")
    config = AutoConfig.from_pretrained(name_or_path, **location)
    if "text_config" in config.sub_configs and isinstance(settings.get("attn_implementation"), str):
        settings["attn_implementation"] = {"text_config": settings["attn_implementation"]}
    return AUTO_CLASSES[config.model_type].from_pretrained(name_or_path, **location, **settings)


def load_processor(name_or_path: str, revision: str | None = None) -> ProcessorMixin | PreTrainedTokenizerBase:
    """
    The processor that belongs to [`load_model`] of the same name; for a backbone alone, its tokenizer. That of a
    pipeline's `model/` lies beside it.

    Raises:
        ValueError: if there is none.
    """
    name_or_path, location = _part_of_pipeline(name_or_path, "processor", revision)
    beside = os.path.join(os.path.dirname(os.path.abspath(name_or_path)), "processor")
    is_beside = os.path.isdir(name_or_path) and os.path.isdir(beside)
    for place in [name_or_path, beside] if is_beside else [name_or_path]:
        if _has_file(place, "processor_config.json", **location):
            return AutoProcessor.from_pretrained(place, **location)
        if any(_has_file(place, file, **location) for file in ("tokenizer_config.json", "tokenizer.json")):
            return AutoTokenizer.from_pretrained(place, trust_remote_code=False, **location)
    raise ValueError(f"{name_or_path!r} holds neither a processor nor a tokenizer.")
