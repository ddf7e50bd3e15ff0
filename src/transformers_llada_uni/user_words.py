"""
Users' words are words: what reads like a control token in them is encoded as any other text is.

A prompt is one string, in part the frame's and in part a user's. [`mark_words`] puts transformers' own marks around
what reads like a control token in the user's part (as its `apply_chat_template(sanitize_control_tokens=True)` does),
and [`encode_prompt`] encodes the whole. Control tokens are all that were added to the tokenizer, special or not.
"""

import re
from bisect import bisect_right
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import Any, TypeVar

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import mark_control_tokens

from .id_rows import padded


Words = TypeVar("Words", str, list, dict)

MARK_START, _, MARK_END = mark_control_tokens("x", re.compile("x"))
_MARKS = re.compile(f"[{MARK_START}{MARK_END}]")


@lru_cache(maxsize=8)
def _patterns(tokenizer: PreTrainedTokenizerFast, num_tokens: int) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """What finds any control token, and what finds a marked one (group 1) or one without marks (group 2)."""
    tokens = sorted(filter(str.strip, tokenizer.added_tokens_encoder), key=len, reverse=True)
    control = "|".join(map(re.escape, tokens)) or "(?!)"
    return re.compile(control), re.compile(f"{MARK_START}({control}){MARK_END}|({control})")


def mark_words(tokenizer: PreTrainedTokenizerFast, words: Words) -> Words:
    """
    A user's words, or any list or dict of them, with marks around what reads like a control token. Marks that were
    there before are dropped, so that nobody can forge them.
    """
    return mark_control_tokens(words, _patterns(tokenizer, len(tokenizer))[0])


def encode_words(tokenizer: PreTrainedTokenizerFast, words: str) -> list[int]:
    """The ids of a user's words on their own; none of them is a control token's."""
    return encode_prompt(tokenizer, mark_words(tokenizer, words))[0]


def encode_prompt(tokenizer: PreTrainedTokenizerFast, prompt: str) -> tuple[list[int], list[tuple[int, int]]]:
    """
    Encodes a prompt in which users' words are marked; one without marks as the tokenizer does.

    A tokenizer cuts a text at its control tokens, and encodes what lies between them on its own. Here only those
    without marks count, so the words between are read as if the tokenizer did not know the marked ones.

    Returns:
        The ids, and the (start, end) of each in `prompt`, marks counted.

    Raises:
        ValueError: if the tokenizer makes a marked control token of plain text.
    """
    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    last = 0
    for start, end in [*_stretches_with_marks(tokenizer, prompt), (len(prompt), len(prompt))]:
        if last < start:
            frame = tokenizer(prompt[last:start], add_special_tokens=False, return_offsets_mapping=True)
            ids += frame["input_ids"]
            spans += [(last + first, last + behind) for first, behind in frame["offset_mapping"]]
        if start < end:
            words = _without_control_tokens(tokenizer).encode(
                _MARKS.sub("", prompt[start:end]), add_special_tokens=False
            )
            places = [place for place in range(start, end) if not _MARKS.match(prompt, place)]
            ids += words.ids
            spans += [(places[first], places[behind - 1] + 1) for first, behind in words.offsets]
            _check_words(tokenizer, prompt[start:end], words.ids)
        last = end
    return ids, spans


# What a tokenizer gives besides ids, or reads them by, and [`encode_prompt`] does not.
_NOT_OF_MARKED_PROMPTS = (
    "add_special_tokens",
    "is_split_into_words",
    "return_length",
    "return_overflowing_tokens",
    "return_special_tokens_mask",
    "return_token_type_ids",
    "stride",
    "text_pair",
)


def check_settings(settings: dict[str, Any]) -> None:
    """Raises ValueError for a setting of a tokenizer's call that cannot be had where users' words are marked."""
    for name in _NOT_OF_MARKED_PROMPTS:
        if settings.get(name):
            raise ValueError(f"`{name}` cannot be had where words are words: encode prompts without a `task` with it.")


def encode_prompts(
    tokenizer: PreTrainedTokenizerFast, prompts: list[str], max_length: int | None, settings: dict[str, Any]
) -> dict[str, list[list]]:
    """
    As the tokenizer would encode prompts with marked words: padded, cut to `max_length` where there is one, and with
    offsets if wanted.

    Args:
        settings: Arguments of a tokenizer's call.
    """
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    rows: dict[str, list[list]] = {"input_ids": [ids[:max_length] for ids, _ in encoded]}
    if settings.get("return_offsets_mapping"):
        rows["offset_mapping"] = [spans[:max_length] for _, spans in encoded]
    return padded(tokenizer, rows, settings)


def _stretches_with_marks(tokenizer: PreTrainedTokenizerFast, prompt: str) -> list[tuple[int, int]]:
    """Where, between two control tokens without marks, there are some with."""
    if not _MARKS.search(prompt):
        return []
    found = _patterns(tokenizer, len(tokenizer))[1].finditer(prompt)
    cuts = [0, *(place for match in found if match.group(2) for place in match.span()), len(prompt)]
    return [(start, end) for start, end in pairwise(cuts) if _MARKS.search(prompt, start, end)]


def _without_control_tokens(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """What the tokenizer does with ordinary text. It shares the model, so making it costs nothing."""
    plain = Tokenizer(tokenizer.backend_tokenizer.model)
    if tokenizer.backend_tokenizer.normalizer is not None:
        plain.normalizer = tokenizer.backend_tokenizer.normalizer
    if tokenizer.backend_tokenizer.pre_tokenizer is not None:
        plain.pre_tokenizer = tokenizer.backend_tokenizer.pre_tokenizer
    return plain


def _check_words(tokenizer: PreTrainedTokenizerFast, words: str, ids: list[int]) -> None:
    for match in _patterns(tokenizer, len(tokenizer))[1].finditer(words):
        token_id = tokenizer.convert_tokens_to_ids(match.group(1))
        if token_id in ids and token_id != tokenizer.unk_token_id:
            raise ValueError(f"`tokenizer` makes the control token {match.group(1)} of plain text as well.")


def cut_words(words: str, num_tokens: Callable[[str], int], max_length: int) -> str:
    """
    The longest beginning of a user's words whose prompt has at most so many tokens: the words are cut, and not what
    frames them.

    Args:
        words (`str`): The user's words.
        num_tokens: The tokens of the whole prompt with other words.
        max_length (`int`): The tokens it may have.

    Raises:
        ValueError: if not even the first word's beginning has room.
    """
    if num_tokens(words) <= max_length:
        return words
    end = bisect_right(range(1, len(words)), max_length, key=lambda end: num_tokens(words[:end]))
    if not words[:end].strip():
        raise ValueError(
            f"`max_length`={max_length} has no room for the words: what frames them takes {num_tokens('')} tokens."
        )
    return words[:end]
