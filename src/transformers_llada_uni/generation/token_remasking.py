"""Re-masking (arXiv 2604.18738): what a block has committed and now doubts becomes a mask again, and is found anew."""

import torch

from .state import BlockState


class TokenRemasking:
    r"""
    Which tokens of a block to find anew. As soon as a row has no mask left in the block, it is checked in a round of
    two steps:

    1. Every second of the tokens that the block has generated is masked, and predicted in view of all others.
    2. The others are, in view of those that the first step holds to; what it doubts stays masked.

    Then ordinary steps fill in what is doubted. The next round follows, until one changes nothing.

    The paper asks for the probability of a token where it stands in plain view, without a step of its own. Only models
    that were trained to edit themselves have a meaningful one there; where a mask stands all have.

    Args:
        threshold (`float`): A token is doubted where its probability is less than this share of that of the most
            probable token. The paper's threshold is of the probability itself, which would doubt all tokens wherever
            many would do, as image codes.
        max_rounds (`int`): Rounds for each row of a block.
        num_per_step (`int`): Masks that a step fills at least.
        mask_token_id (`int`): What a masked token is fed as.
    """

    def __init__(self, threshold: float, max_rounds: int, num_per_step: int, mask_token_id: int):
        self.threshold, self.max_rounds, self.num_per_step = threshold, max_rounds, num_per_step
        self.mask_token_id = mask_token_id

    def begin(self, state: BlockState) -> None:
        """To be called at the start of a block."""
        state.generated.copy_(state.masked)
        state.num_post_steps.zero_()
        state.checked.zero_()

    def count(self, state: BlockState, count: torch.Tensor) -> torch.Tensor:
        """`(rows, 1)`, how many masks a step fills: `count` of them until the first check."""
        return torch.where(state.num_post_steps[:, None] > 0, self.num_per_step, count)

    def restore(self, state: BlockState, commit: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """
        Puts back what a check holds to. To be called once a step, before anything is committed.

        Args:
            state: The block before the step.
            commit: `(rows, block)`, which masks the step would fill.
            shares: `(rows, block)`, see [`shares_of_best`], of the tokens that are checked.

        Returns:
            `(rows, block)`, which masks it shall fill: none in rows that are checked.
        """
        kept = state.checked & (shares >= self.threshold)
        state.write(kept, state.before)
        state.masked &= ~kept
        return commit & ~state.checked.any(dim=-1, keepdim=True)

    def check(self, state: BlockState) -> None:
        """Masks what the next step checks. To be called once a step, when all is committed."""
        number = state.num_post_steps
        has_changed = (number == 0) | (state.tokens[0] != state.before).any(dim=-1)
        is_second = number % 2 == 1
        begins = ~is_second & (number < 2 * self.max_rounds) & has_changed & ~state.masked.any(dim=-1)
        state.before.copy_(torch.where(begins[:, None], state.tokens[0], state.before))
        ranks = state.generated.cumsum(dim=-1) - 1
        half = state.generated & (ranks % 2 == number[:, None] % 2)
        is_checked = begins | is_second
        state.checked.copy_(half & is_checked[:, None])
        state.write(state.checked, torch.full_like(state.before, self.mask_token_id))
        state.masked |= state.checked
        state.num_post_steps += is_checked


def shares_of_best(logits: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """
    Args:
        logits: `(positions, vocabulary)`.
        indices: `(positions,)`, one of each; what lies outside is moved to the edge.

    Returns:
        `(positions,)`, their probabilities as shares of that of the most probable.
    """
    indices = indices.clamp(0, logits.shape[-1] - 1)
    return (logits.gather(-1, indices[:, None])[:, 0] - logits.amax(dim=-1)).exp()
