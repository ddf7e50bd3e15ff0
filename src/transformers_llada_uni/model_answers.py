"""What a model wrote, taken apart: its thoughts, its words, and the codes of its images."""

import math
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from .image_places import ImageTokens
from .prompts import ANSWER


def cut_thoughts(
    rows: list[list[int]], masks: list[list[int]] | None, tokenizer: PreTrainedTokenizerFast, image_tokens: ImageTokens
) -> list[list[int]]:
    """
    Prompts and the thoughts behind them, without padding and without what was written of an image's header.

    Args:
        rows: What `generate` returned.
        masks: Of the prompts at least; without them pad tokens in front are taken for padding.
        tokenizer: Knows what ends an answer.
        image_tokens: What frames an image.

    Raises:
        ValueError: naming the row, if it holds no `<role>ASSISTANT</role>`.
    """
    answer = tokenizer(ANSWER, add_special_tokens=False)["input_ids"]
    special = [tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.mask_token_id]
    ends = {*special, image_tokens.begin, tokenizer.added_tokens_encoder.get("<|role_end|>")}
    found = []
    for number, row in enumerate(rows):
        mask = [token != tokenizer.pad_token_id for token in row] if masks is None else masks[number]
        start = mask.index(1) if 1 in mask else len(mask)
        kept = cut_answer(row[start:], answer, ends, image_tokens.start)
        if kept is None:
            raise ValueError(f"`input_ids`: row {number} holds no {ANSWER}, after which a model would think.")
        found.append(kept)
    return found


def cut_answer(row: list[int], answer: list[int], ends: set[int | None], image_start: int) -> list[int] | None:
    """
    A sequence without what the model wrote of an image's header: up to the last `image_start` of its answer, or else
    to the first of `ends` there. None if `answer`, with which the answer starts, is nowhere in it.
    """
    starts = [i for i in range(len(row)) if row[i : i + len(answer)] == answer]
    if not starts:
        return None
    start = starts[-1] + len(answer)
    end = next((i for i in range(start, len(row)) if row[i] in ends), len(row))
    begun = [i for i in range(start, end) if row[i] == image_start]
    return row[: begun[-1] if begun else end]


def parts_of(
    row: list[int],
    tokenizer: PreTrainedTokenizerFast,
    image_tokens: ImageTokens,
    image_token_offset: int | None,
    codebook_size: int | None,
    skip_special_tokens: bool,
    **kwargs: Any,
) -> list[str | torch.Tensor]:
    """
    The parts of a sequence in order: words, and codes `(H, W)` of images. One that was given as pixels, or is not
    complete, is left out.

    Args:
        row: Token ids.
        tokenizer: Ids to words.
        image_tokens: What frames an image.
        image_token_offset, codebook_size: Which ids are codes; `None` for none, and for all from the first on.
        skip_special_tokens: Whether to leave special tokens, and codes outside of an image, out of the words.
        **kwargs: For the tokenizer's `decode`.

    Raises:
        ValueError: if there is an image and `image_token_offset` is None.
    """

    def is_code(token: int) -> bool:
        if image_token_offset is None or token < image_token_offset:
            return False
        return codebook_size is None or token < image_token_offset + codebook_size

    parts: list[str | torch.Tensor] = []
    for grid, ids in image_tokens.split(row):
        if grid is not None and all(token == image_tokens.grid[0] for token in ids):
            continue  # given as pixels
        if grid is not None:
            if image_token_offset is None:
                raise ValueError("`image_token_offset` is None, so codes cannot be told from text.")
            if len(ids) == math.prod(grid) and all(map(is_code, ids)):
                parts.append(torch.tensor(ids).view(grid) - image_token_offset)
        else:
            ids = [token for token in ids if not (skip_special_tokens and is_code(token))]
            text = str(tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, **kwargs)) if ids else ""
            parts += [text] if text else []
    return parts
