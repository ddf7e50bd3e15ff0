"""Token ids as lists of rows: of any form, and padded."""

from typing import Any

from transformers import PreTrainedTokenizerFast


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


# Of a tokenizer's call: what [`padded`] cannot do afterwards.
NOT_PADDED_AFTERWARDS = ("truncation", "stride", "return_overflowing_tokens", "return_length", "is_split_into_words")


def encode_rows(
    tokenizer: PreTrainedTokenizerFast, rows: list[str], settings: dict[str, Any]
) -> dict[str, list[list]]:
    """
    As `tokenizer(rows, **settings)` gives it, which would set the tokenizer's padding: a state that threads share.
    """
    if not settings.get("padding") or any(settings.get(name) for name in NOT_PADDED_AFTERWARDS):
        return dict(tokenizer(rows, **settings))
    return padded(tokenizer, dict(tokenizer(rows, **{**settings, "padding": False, "max_length": None})), settings)


def padded(
    tokenizer: PreTrainedTokenizerFast, encoded: dict[str, list[list]], settings: dict[str, Any]
) -> dict[str, list[list]]:
    """Rows of ids and what belongs to each, on the left also of offsets, as the settings of a tokenizer's call say."""
    names = ["padding", "pad_to_multiple_of", "padding_side"]
    names += ["max_length"] if settings["padding"] == "max_length" else []
    offsets = encoded.pop("offset_mapping", None)
    wanted: dict[str, Any] = {name: settings.get(name) for name in names}
    rows = dict(tokenizer.pad(encoded, return_attention_mask=True, **wanted))
    if offsets is not None:
        counts = [mask.count(0) for mask in rows["attention_mask"]]
        rows["offset_mapping"] = [[(0, 0)] * count + row for count, row in zip(counts, offsets, strict=True)]
    return rows
