"""Conversations to ids, and ids to the text of an answer while they come."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from transformers import PreTrainedTokenizerFast
from transformers.image_processing_utils import BatchFeature

from transformers_llada_uni.chat_messages import encode_chat
from transformers_llada_uni.generation.continuous_batch import ContinuousBatch


class ChatModel(Protocol):
    """What answers: a language model, and the processor or, of a text-only model, the tokenizer that writes for it."""

    model: Any
    processor: Any


class PromptTooLong(ValueError):
    """A conversation of too many tokens."""


def read_conversation(processor: Any, messages: list[dict[str, Any]], max_tokens: int | None = None) -> BatchFeature:
    """
    A conversation as the model's inputs, places held open for images.

    Args:
        processor: Of a [`ChatModel`].
        messages: See the pipeline's `chat`.
        max_tokens: Most tokens. Default: no limit here.

    Raises:
        PromptTooLong: if there are more.
        ValueError, TypeError: if they are no conversation.
    """
    if isinstance(processor, PreTrainedTokenizerFast):
        inputs = BatchFeature({"input_ids": [encode_chat(processor, messages)]}, tensor_type="pt")
    else:
        inputs = processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
    length = inputs["input_ids"].shape[1]
    if max_tokens is not None and length > max_tokens:
        raise PromptTooLong(f"`messages` are {length} tokens; at most {max_tokens} are taken.")
    return inputs


@torch.no_grad()
def write_prompt(model: Any, processor: Any, messages: list[dict[str, Any]]) -> torch.Tensor:
    """
    A conversation as ids `(length,)`, images in it as their codes.

    Args:
        model, processor: Of a [`ChatModel`].
        messages: See the pipeline's `chat`.

    Raises:
        ValueError, TypeError: if they are no conversation.
    """
    inputs = read_conversation(processor, messages).to(model.device)
    if isinstance(processor, PreTrainedTokenizerFast):
        return inputs["input_ids"][0]
    images = inputs.get("pixel_values"), inputs.get("image_grid_thw")
    return model.place_images({"input_ids": inputs["input_ids"]}, *images)["input_ids"][0]


class Answer:
    """
    The text of an answer while its tokens come, cut at the first stop string.

    Args:
        tokenizer: Of the model.
        stop_strings: What ends the answer, and is left out.

    Attributes:
        text: So far.
        is_stopped: Whether a stop string has come.
    """

    def __init__(self, tokenizer: Any, stop_strings: Sequence[str] = ()):
        self.tokenizer, self.stop_strings = tokenizer, stop_strings
        self.text, self.is_stopped = "", False

    def take(self, tokens: list[int], is_finished: bool) -> str:
        """
        Args:
            tokens: All tokens so far.
            is_finished: Whether no more will come.

        Returns:
            The text that is new, and will not change.
        """
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        if places := [place for stop in self.stop_strings if (place := text.find(stop)) >= 0]:
            text, self.is_stopped = text[: min(places)], True
        if not (is_finished or self.is_stopped):
            # A character whose bytes have not all come, and what may be the beginning of a stop string, wait.
            text = text.rstrip("\N{REPLACEMENT CHARACTER}")
            held = max((_overlap(text, stop) for stop in self.stop_strings), default=0)
            text = text[: len(text) - held]
        new = text[len(self.text) :]
        self.text = text
        return new


def _overlap(text: str, stop: str) -> int:
    """How many last characters of `text` begin `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def stream_answer(
    chat_model: ChatModel,
    messages: list[dict[str, Any]],
    max_new_tokens: int,
    seed: int | None = None,
    **settings: Any,
) -> Iterator[str]:
    """
    The pieces of an answer, block by block; who takes no more of them ends it.

    Args:
        chat_model: What answers.
        messages: See the pipeline's `chat`.
        max_new_tokens: Most tokens; fewer where the model's positions end.
        seed: Makes sampled text repeatable.
        **settings: Further fields of `BlockDiffusionGenerationConfig`.
    """
    model, processor = chat_model.model, chat_model.processor
    ids = write_prompt(model, processor, messages)
    room = model.config.get_text_config().max_position_embeddings - len(ids)
    batch = ContinuousBatch(model, **settings)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    row = batch.add(ids, max(min(max_new_tokens, room), 1), generator)
    answer = Answer(getattr(processor, "tokenizer", processor))
    while batch.rows:
        batch.step()
        yield answer.take(row.tokens, row.is_finished)
