"""The model and the processor of a name, whichever of the layouts it has."""

from typing import Any

from accelerate.utils import is_peft_model
from torch import nn
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
    model_class = AutoModelForMultimodalLM if config.model_type == "llada_uni" else AutoModelForCausalLM
    return model_class.from_pretrained(name_or_path, **location, **settings)


def load_processor(name_or_path: str, revision: str | None = None) -> ProcessorMixin | PreTrainedTokenizerBase:
    """The processor that belongs to [`load_model`] of the same name; for a backbone alone, its tokenizer."""
    location = {"revision": revision}
    if _has_file(name_or_path, "model_index.json", revision):
        return AutoProcessor.from_pretrained(name_or_path, subfolder="processor", **location)
    has_processor = _has_file(name_or_path, "processor_config.json", revision)
    return (AutoProcessor if has_processor else AutoTokenizer).from_pretrained(name_or_path, **location)


def base_of(model: nn.Module) -> PreTrainedModel:
    """The model itself, or the one inside a `PeftModel`."""
    return model.get_base_model() if is_peft_model(model) else model


def resolve_model(
    model: str | PreTrainedModel,
    processing_class: ProcessorMixin | PreTrainedTokenizerBase | None,
    model_init_kwargs: dict[str, Any] | None,
    block_length: int | None,
) -> tuple[PreTrainedModel, ProcessorMixin | PreTrainedTokenizerBase, int]:
    """
    What every trainer of the language model begins with: the model and its processor, loaded if need be, and the block
    length, which the model is given as well, since what it is trained with is what it generates with.

    Raises:
        ValueError: if nobody knows the mask token.
    """
    if processing_class is None:
        processing_class = load_processor(model if isinstance(model, str) else model.config.name_or_path)
    if isinstance(model, str):
        model = load_model(model, **(model_init_kwargs or {}))
    config = model.config.get_text_config()
    if config.mask_token_id is None:
        config.mask_token_id = getattr(processing_class, "tokenizer", processing_class).mask_token_id
    if config.mask_token_id is None:
        raise ValueError("`mask_token_id` is known neither to the model's configuration nor to the tokenizer.")
    block_length = config.block_length if block_length is None else block_length
    config.block_length = model.generation_config.block_length = block_length
    return model, processing_class, block_length
