"""Guidance over time: none while little of an image is known, all of it once much is (arXiv 2507.08965)."""

from typing import Any

import torch

from .canvas import Canvas


def check_ramp(settings: dict[str, Any], is_guided: bool) -> None:
    """Raises ValueError where a call names a ramp, and has no guidance that could rise."""
    if settings.get("guidance_ramp") is not None and not is_guided:
        raise ValueError("`guidance_ramp` is given, but there is no guidance: `guidance_scale` is 1.")


def guidance_weights(
    ramp: tuple[float, float], canvas: Canvas, block_length: int, counts_of_steps: list[int]
) -> torch.Tensor:
    """
    The weight of guidance in every step there may be, from 0 to 1. It goes by the share of an image's codes that are
    known by then, counted by the schedule: so it depends on no prediction, and never falls.

    Args:
        ramp: The share up to which the weight is 0, and that from which on it is 1. Between them it rises linearly.
        canvas: What each row generates is its image.
        block_length: Tokens in a block.
        counts_of_steps: What each step of a block commits at least.

    Returns:
        `(blocks, steps, rows)`, float32 on the CPU, 0 where a row has nothing to find. The device is waited for.
    """
    columns = torch.arange(canvas.num_columns, device=canvas.ids.device)
    # A row's last block may reach beyond its image.
    of_image = canvas.masked & (columns < canvas.end[:, None])
    masks, codes = (of.unflatten(-1, (-1, block_length)).sum(dim=-1).T.cpu() for of in (canvas.masked, of_image))
    num_codes = (canvas.end - canvas.prompt_end).cpu()
    later = codes.flip(0).cumsum(dim=0).flip(0) - codes
    committed = torch.tensor([0, *counts_of_steps[:-1]]).cumsum(dim=0)
    left_in_block = torch.minimum((masks[:, None] - committed[:, None]).clamp(min=0), codes[:, None])
    known = (num_codes - later[:, None] - left_in_block).double() / num_codes
    begin, end = ramp
    weights = (known >= end).double() if begin == end else ((known - begin) / (end - begin)).clamp(0.0, 1.0)
    return torch.where(codes[:, None] > 0, weights, 0.0).float()


def first_guided_block(weights: torch.Tensor) -> int:
    """The first block in which guidance weighs more than 0, of any row; where none does, the number of blocks."""
    is_guided = (weights > 0).any(dim=-1).any(dim=-1).tolist()
    return is_guided.index(True) if any(is_guided) else len(is_guided)
