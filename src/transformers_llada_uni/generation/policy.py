"""The policy of a step: which of its predictions are committed."""

import torch

from .configuration import BlockDiffusionGenerationConfig
from .sampling import commit_schedule, select_positions
from .sprint import SprintConfig
from .state import BlockState
from .token_editing import TokenEditing


class CommitPolicy:
    """
    Updates a block by what a step has predicted, in place and without a look at any value.

    Args:
        config ([`BlockDiffusionGenerationConfig`]): Steps of a block, threshold, token editing.
        device (`torch.device`): Of the blocks.
        is_image (`bool`): Use the rule for image codes, see [`select_positions`].
        sprint ([`SprintConfig`], *optional*): Fill a block as evenly as its steps allow.
    """

    def __init__(
        self,
        config: BlockDiffusionGenerationConfig,
        device: torch.device,
        is_image: bool,
        sprint: SprintConfig | None = None,
    ):
        self.threshold, self.is_image, self.sprint = config.threshold, is_image, sprint
        self.schedule = schedule_of(config)
        # Steps beyond the schedule only edit.
        self.counts_of_steps = self.schedule + [0] * (num_steps_of(config) - len(self.schedule))
        self.counts = torch.tensor(self.counts_of_steps, device=device)
        self.editing = None
        if config.editing_threshold is not None:
            self.editing = TokenEditing(config.editing_threshold, config.max_post_steps)
        # Where nothing can be sure, the schedule alone tells how many masks are left.
        self.is_scheduled = config.threshold >= 1 and self.editing is None and sprint is None

    def begin(self, state: BlockState) -> None:
        """To be called at the start of a block."""
        if self.editing is not None:
            self.editing.begin(state)

    def update(
        self, state: BlockState, tokens: torch.Tensor, probabilities: torch.Tensor, ranking: torch.Tensor
    ) -> None:
        """
        Args:
            state: The block.
            tokens: `(rows, block)`, the ids that were predicted.
            probabilities, ranking: `(rows, block)`, of these; 0 where nothing was predicted.
        """
        if self.sprint is None:
            count = self.counts.index_select(0, state.step[None])
        else:
            steps_left = (len(self.schedule) - state.step).clamp(min=1)
            count = torch.ceil(state.masked.sum(dim=-1, keepdim=True) / steps_left)
        commit = select_positions(
            state.masked,
            ranking,
            probabilities,
            count,
            self.threshold,
            at_least_count=self.is_image or self.sprint is not None,
        )
        changed = commit
        if self.editing is not None:
            changed = commit | self.editing.edit(state, commit, tokens, probabilities)
        state.tokens[0].copy_(torch.where(changed, tokens, state.tokens[0]))
        if len(state.tokens) > 1:
            # All branches take the same tokens; what their prompts say instead is their own.
            state.tokens[1:].copy_(torch.where(changed & state.is_new, tokens, state.tokens[1:]))
        state.confidence.copy_(torch.where(changed, probabilities.to(state.confidence.dtype), state.confidence))
        state.masked &= ~commit
        state.predicted.copy_(state.masked if self.editing is None else self.editing.to_predict(state))
        state.num_left.copy_(state.predicted.sum(dim=-1).amax())
        state.step += 1


def schedule_of(config: BlockDiffusionGenerationConfig) -> list[int]:
    """What each step commits at least. More steps than tokens would find nothing left to do."""
    return commit_schedule(config.block_length, min(config.num_steps_per_block, config.block_length))


def num_steps_of(config: BlockDiffusionGenerationConfig) -> int:
    """Steps a block may take, those that only edit among them."""
    post_steps = 0 if config.editing_threshold is None else config.max_post_steps
    return len(schedule_of(config)) + post_steps
