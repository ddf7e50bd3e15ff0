"""How long blocks are in the course of a run, for a model that learnt from left to right: a block of one token."""

from collections.abc import Sequence

from ..input_checks import check_integer, check_number


def check_block_schedule(lengths: Sequence[int] | None, shares: Sequence[float] | None) -> None:
    """
    Raises:
        ValueError, TypeError: naming the field, unless both are left out, or both are as long, of positive numbers and
            the shares of at most 1 in all.
    """
    if (lengths is None) != (shares is None):
        raise ValueError("`block_lengths` and `block_length_shares` must be given together.")
    if lengths is None or shares is None:
        return
    if len(lengths) != len(shares):
        raise ValueError(f"`block_length_shares` must have {len(lengths)} entries as `block_lengths`, got {shares!r}.")
    for length, share in zip(lengths, shares, strict=True):
        check_integer("block_lengths", length, 1)
        check_number("block_length_shares", share, 0.0, 1.0)
    if sum(shares) > 1:
        raise ValueError(f"`block_length_shares` must be at most 1 in all, got {shares!r}.")


def block_length_at(
    step: int,
    max_steps: int,
    block_length: int,
    lengths: Sequence[int] | None = None,
    shares: Sequence[float] | None = None,
) -> int:
    """
    The block length of a training step. It depends on nothing but its arguments, so a resumed run goes on where it
    was.

    Args:
        step: Optimiser steps done so far.
        max_steps: Of the whole run.
        block_length: The final one.
        lengths: Those before it, in order.
        shares: The share of all steps that each of them lasts.
    """
    check_block_schedule(lengths, shares)
    end = 0.0
    for length, share in zip(lengths or (), shares or (), strict=True):
        end += share * max_steps
        if step < end - 1e-9:
            return length
    return block_length
