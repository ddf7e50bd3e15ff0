"""What every trainer of the language model begins with: the model, its processor and the block length."""

from typing import Any

from accelerate.utils import is_peft_model
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from ..loading.model_loading import load_model, load_processor


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
