"""Token editing of LLaDA2.1 (arXiv 2602.08676): what a block has committed may still be replaced, until it is left."""

import torch

from .state import BlockState


class TokenEditing:
    """
    Which tokens of a block to replace. Every row keeps its own count of steps, so that a row in a batch equals the row
    alone.

    Args:
        threshold (`float`): Tokens predicted with more than this replace others.
        max_post_steps (`int`): Steps a block may take after its last mask.
    """

    def __init__(self, threshold: float, max_post_steps: int):
        self.threshold, self.max_post_steps = threshold, max_post_steps

    def begin(self, state: BlockState) -> None:
        """To be called at the start of a block."""
        state.generated.copy_(state.masked)
        state.is_active.copy_(state.masked.any(dim=-1))
        state.num_post_steps.zero_()

    def edit(
        self, state: BlockState, commit: torch.Tensor, new_tokens: torch.Tensor, probabilities: torch.Tensor
    ) -> torch.Tensor:
        """
        To be called once a step, before anything is committed.

        Args:
            state: The block before the step.
            commit: `(rows, block)`, which masks the step fills.
            new_tokens: `(rows, block)`, the ids that were predicted.
            probabilities: `(rows, block)`, of `new_tokens`; 0 where nothing was predicted.

        Returns:
            `(rows, block)`, true where a committed token is replaced.
        """
        masked = state.masked
        edits = state.predicted & ~masked & (new_tokens != state.tokens[0]) & (probabilities > self.threshold)
        state.num_post_steps += state.is_active & ~masked.any(dim=-1)
        # What a step has changed deserves another look; where it has changed nothing, neither would the next.
        changed = (commit | edits).any(dim=-1) & (state.num_post_steps < self.max_post_steps)
        state.is_active &= changed | (masked & ~commit).any(dim=-1)
        return edits

    def to_predict(self, state: BlockState) -> torch.Tensor:
        """`(rows, block)`, true where the next step needs a prediction."""
        return state.generated & state.is_active[:, None]
