"""Token ids as lists of rows: of any form, and padded."""

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
