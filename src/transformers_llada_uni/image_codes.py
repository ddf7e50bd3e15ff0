"""Images that are given as their codes, in place of pixels."""

from typing import Any

import torch

from .input_checks import check_tensor


def fetch_codes(image_codes: Any, codebook_size: int | None, largest: int) -> Any:
    """
    Checks images that are given as codes.

    Args:
        image_codes: A `torch.LongTensor` `(H, W)` of codes, a list of these, or a list of lists.
        codebook_size (`int`, *optional*): Codes lie below it.
        largest (`int`): Of the numbers that a header can name.

    Returns:
        The same, tensors on the CPU, tuples as lists.

    Raises:
        TypeError, ValueError: naming `image_codes`, for what are no codes.
    """
    if isinstance(image_codes, (list, tuple)):
        return [fetch_codes(entry, codebook_size, largest) for entry in image_codes]
    check_tensor("image_codes", image_codes, (torch.long, torch.int), ndim=2)
    if not image_codes.numel():
        raise ValueError(f"`image_codes` must have the shape (H, W), none of them 0, got {tuple(image_codes.shape)}.")
    if max(image_codes.shape) > largest:
        raise ValueError(
            f"`image_codes` of {image_codes.shape[0]} x {image_codes.shape[1]}: the tokenizer has numbers up to "
            f"{largest} only."
        )
    low, high = int(image_codes.min()), int(image_codes.max())
    if low < 0 or (codebook_size is not None and high >= codebook_size):
        last = "" if codebook_size is None else codebook_size - 1
        raise ValueError(f"`image_codes` must lie in 0..{last}, got {low if low < 0 else high}.")
    return image_codes.cpu()


def fill_places(rows: list[list[int]], samples: list[list[torch.Tensor]], place: int, offset: int) -> list[list[int]]:
    """Rows of ids, with the tokens of each row's images, in order, where `place` holds one open."""
    filled = []
    for row, sample in zip(rows, samples, strict=True):
        tokens = iter([code + offset for codes in sample for code in codes.flatten().tolist()])
        filled.append([next(tokens, token) if token == place else token for token in row])
    return filled
