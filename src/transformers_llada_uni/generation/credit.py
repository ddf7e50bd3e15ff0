"""Credit decoding (arXiv 2510.06133): what a mask was predicted as in earlier steps counts for it in later ones."""

import torch

from .state import BlockState


# As in dInfer; the paper leaves both between 0 and 1.
DECAY = 0.8
EXPONENT = 0.2


class CreditDecoding:
    r"""
    A mask is often predicted right several steps before it is sure enough to be committed. So every step gives credit
    to the most probable token v* of each mask, of probability p, and adds to the logits what has been earned:

        C_v <- DECAY * C_v + (p ** EXPONENT if v is v* else 0)
        logit_v <- logit_v + alpha * log(1 + C_v)

    It helps where blocks take many steps, as with a high threshold; a token that is sure in its first step has earned
    next to nothing.

    Only tokens that were the most probable one in some step have credit, so those are what is kept: of each step a
    token and what it earned, in place of a number for every token of the vocabulary.

    Args:
        alpha (`float`): Weight of the credit.
    """

    def __init__(self, alpha: float):
        self.alpha = alpha

    def __call__(self, state: BlockState, logits: torch.Tensor, columns: torch.Tensor | None) -> torch.Tensor:
        """
        To be called once a step, before anything is committed.

        Args:
            state: The block before the step; its credits are changed in place.
            logits: `(rows * kept, ids)`.
            columns: `(rows, kept)`, which columns of the block they are of. `None`: all.

        Returns:
            The logits with credit, in masks alone.
        """
        assert state.credits is not None and state.credited is not None
        if columns is None:
            num_rows, block_length = state.masked.shape
            columns = torch.arange(block_length, device=logits.device).expand(num_rows, -1)
        masked = state.masked.gather(1, columns)
        best, indices = (values.view(columns.shape) for values in logits.softmax(dim=-1).max(dim=-1))
        # `columns` may hold others than masks, as other rows of a batch have it: they earn nothing.
        earned = (best**EXPONENT).to(state.confidence.dtype) * masked
        earned = torch.zeros_like(state.confidence).scatter(1, columns, earned)
        state.credits.index_copy_(0, state.step[None], earned[None])
        of_block = torch.zeros_like(state.credited[0]).scatter(1, columns, indices)
        state.credited.index_copy_(0, state.step[None], of_block[None])

        # Steps to come have earned nothing yet, whatever their decay.
        ages = (state.step - torch.arange(len(state.credits), device=logits.device)).clamp(min=0)
        credits = (state.credits * (DECAY**ages)[:, None, None]).gather(2, columns.expand(len(ages), -1, -1))
        candidates = state.credited.gather(2, columns.expand(len(ages), -1, -1))
        # A token that was the most probable one several times has earned them all.
        total = ((candidates[:, None] == candidates[None]) * credits[None]).sum(dim=1)
        bonus = self.alpha * total.log1p() * masked
        index = candidates.flatten(1).T
        return logits.scatter(1, index, logits.gather(1, index) + bonus.flatten(1).T)
