"""The model and the processor of a name, whichever of the layouts it has."""

from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.distributed import DistributedConfig
from transformers.utils import cached_file


# The Auto class of the model with a head, by model type
AUTO_CLASSES = {"llada_uni": AutoModelForMultimodalLM, "llada2_moe": AutoModelForCausalLM}


def _has_file(name_or_path: str, file: str, revision: str | None) -> bool:
    found = cached_file(name_or_path, file, revision=revision, _raise_exceptions_for_missing_entries=False)
    return found is not None


def load_model(name_or_path: str, revision: str | None = None, **settings: Any) -> PreTrainedModel:
    """
    A language model from a pipeline's folder or repository, from its `model/`, or from the released layout.

    Args:
        name_or_path (`str`): A folder, or a repository of the Hub.
        revision (`str`, *optional*): Of the repository.
        **settings: For `from_pretrained`; `distributed_config` may be a dict, as it is in a configuration file.

    Returns:
        [`LLaDAUniForConditionalGeneration`], or [`LLaDA2MoeForBlockDiffusion`] for the backbone alone.
    """
    location = {"revision": revision}
    if _has_file(name_or_path, "model_index.json", revision):
        location["subfolder"] = "model"
    if isinstance(settings.get("distributed_config"), dict):
        settings["distributed_config"] = DistributedConfig(**settings["distributed_config"])
    config = AutoConfig.from_pretrained(name_or_path, **location)
    return AUTO_CLASSES[config.model_type].from_pretrained(name_or_path, **location, **settings)


def load_processor(name_or_path: str, revision: str | None = None) -> ProcessorMixin | PreTrainedTokenizerBase:
    """The processor that belongs to [`load_model`] of the same name; for a backbone alone, its tokenizer."""
    location = {"revision": revision}
    if _has_file(name_or_path, "model_index.json", revision):
        return AutoProcessor.from_pretrained(name_or_path, subfolder="processor", **location)
    has_processor = _has_file(name_or_path, "processor_config.json", revision)
    return (AutoProcessor if has_processor else AutoTokenizer).from_pretrained(name_or_path, **location)
