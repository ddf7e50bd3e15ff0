"""Token ids as lists of rows: of any form, padded, and cut where a model's thoughts end."""

from typing import Any


def to_lists(ids: Any) -> list[list[int]]:
    """Ids in any form as a list of rows; one row on its own is a batch of one."""
    rows = ids.tolist() if hasattr(ids, "tolist") else [row.tolist() if hasattr(row, "tolist") else row for row in ids]
    return rows if not rows or isinstance(rows[0], list | tuple) else [rows]


def left_pad(rows: list[list[int]], pad_token_id: int | None) -> tuple[list[list[int]], list[list[int]]]:
    """Rows of one length, and their attention mask; raises ValueError if padding is needed and there is no token."""
    length = max(map(len, rows))
    padding = [length - len(row) for row in rows]
    if pad_token_id is None:
        if any(padding):
            raise ValueError("`tokenizer` has no pad token, so rows of different lengths cannot be padded.")
        pad_token_id = 0  # never needed
    ids = [[pad_token_id] * count + row for count, row in zip(padding, rows, strict=True)]
    return ids, [[0] * count + [1] * (length - count) for count in padding]


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
