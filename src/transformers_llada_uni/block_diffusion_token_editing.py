"""Token editing of LLaDA2.1 (arXiv 2602.08676): what a block has committed may still be replaced, until it is left."""

import torch

from .generation_configuration import BlockDiffusionGenerationConfig


class TokenEditing:
    """
    Which columns of a block to predict, and which of its tokens to replace. Every row keeps its own count of steps, so
    that a row in a batch equals the row alone.

    Args:
        config ([`BlockDiffusionGenerationConfig`]): `editing_threshold` and `max_post_steps`.
        masked (`torch.BoolTensor` of shape `(rows, block)`): The block's masks at its first step. Only what is
            generated there may be replaced; the prompt stays.
    """

    def __init__(self, config: BlockDiffusionGenerationConfig, masked: torch.Tensor):
        self.threshold, self.max_post_steps = config.editing_threshold, config.max_post_steps
        self.generated = masked
        self.is_active = masked.any(dim=-1)  # rows with masks, and rows whose last step has changed something
        self.num_post_steps = torch.zeros_like(self.is_active, dtype=torch.long)

    def columns(self) -> torch.Tensor:
        """`(rows, block)`, true where the next step needs a prediction."""
        return self.generated & self.is_active[:, None]

    def edit(
        self,
        masked: torch.Tensor,
        commit: torch.Tensor,
        tokens: torch.Tensor,
        new_tokens: torch.Tensor,
        probabilities: torch.Tensor,
    ) -> torch.Tensor:
        """
        To be called once a step.

        Args:
            masked, commit: `(rows, block)`, masks before this step, and which of them it fills.
            tokens, new_tokens: `(rows, block)`, the ids that stand there and those that were predicted.
            probabilities: `(rows, block)`, of `new_tokens`; 0 where nothing was predicted.

        Returns:
            `(rows, block)`, true where a committed token is replaced.
        """
        edits = self.columns() & ~masked & (new_tokens != tokens) & (probabilities > self.threshold)
        self.num_post_steps = self.num_post_steps + (self.is_active & ~masked.any(dim=-1))
        # What a step has changed deserves another look; where it has changed nothing, neither would the next.
        changed = (commit | edits).any(dim=-1) & (self.num_post_steps < self.max_post_steps)
        self.is_active = self.is_active & (changed | (masked & ~commit).any(dim=-1))
        return edits
