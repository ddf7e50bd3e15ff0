"""The policy of a step: which of its predictions are committed."""

import torch

from .configuration import BlockDiffusionGenerationConfig
from .sampling import commit_schedule, select_positions
from .sprint import SprintConfig
from .state import BlockState
from .token_editing import TokenEditing
from .token_remasking import TokenRemasking


class CommitPolicy:
    """
    Updates a block by what a step has predicted, in place and without a look at any value.

    Args:
        config ([`BlockDiffusionGenerationConfig`]): Steps of a block, threshold, token editing, re-masking.
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
        self.num_filling_steps, self.counts_of_steps = len(schedule_of(config)), counts_of_steps(config)
        self.counts = torch.tensor(self.counts_of_steps, device=device)
        self.editing = None
        if config.editing_threshold is not None:
            self.editing = TokenEditing(config.editing_threshold, config.max_post_steps)
        self.remasking = None
        if config.remasking_threshold is not None:
            assert config.mask_token_id is not None  # it is settled
            rounds, num_per_step = config.max_remasking_rounds, num_per_step_of(config)
            self.remasking = TokenRemasking(config.remasking_threshold, rounds, num_per_step, config.mask_token_id)
        # Where nothing can be sure, the schedule alone tells how many masks are left.
        corrects_itself = self.editing is not None or self.remasking is not None
        self.is_scheduled = config.threshold >= 1 and not corrects_itself and sprint is None

    def begin(self, state: BlockState) -> None:
        """To be called at the start of a block."""
        if self.editing is not None:
            self.editing.begin(state)
        if self.remasking is not None:
            self.remasking.begin(state)

    def update(
        self,
        state: BlockState,
        tokens: torch.Tensor,
        probabilities: torch.Tensor,
        ranking: torch.Tensor,
        shares: torch.Tensor | None = None,
    ) -> None:
        """
        Args:
            state: The block.
            tokens: `(rows, block)`, the ids that were predicted.
            probabilities, ranking: `(rows, block)`, of these; 0 where nothing was predicted.
            shares: `(rows, block)`, of `state.before`, see [`shares_of_best`]; for re-masking.
        """
        if self.sprint is None:
            count = self.counts.index_select(0, state.step[None])
        else:
            steps_left = (self.num_filling_steps - state.step).clamp(min=1)
            count = torch.ceil(state.masked.sum(dim=-1, keepdim=True) / steps_left)
        if self.remasking is not None:
            count = self.remasking.count(state, count)
        commit = select_positions(
            state.masked,
            ranking,
            probabilities,
            count,
            self.threshold,
            at_least_count=self.is_image or self.sprint is not None,
        )
        if self.remasking is not None:
            assert shares is not None
            commit = self.remasking.restore(state, commit, shares)
        changed = commit
        if self.editing is not None:
            changed = commit | self.editing.edit(state, commit, tokens, probabilities)
        state.write(changed, tokens)
        state.confidence.copy_(torch.where(changed, probabilities.to(state.confidence.dtype), state.confidence))
        state.masked &= ~commit
        if self.remasking is not None:
            self.remasking.check(state)
        state.predicted.copy_(state.masked if self.editing is None else self.editing.to_predict(state))
        state.num_left.copy_(state.predicted.sum(dim=-1).amax())
        state.step += 1


def schedule_of(config: BlockDiffusionGenerationConfig) -> list[int]:
    """What each step commits at least. More steps than tokens would find nothing left to do."""
    num_steps = min(config.num_steps_per_block, config.block_length)
    return commit_schedule(config.block_length, num_steps, config.masking_schedule)


def counts_of_steps(config: BlockDiffusionGenerationConfig) -> list[int]:
    """The same of all steps a block may take: those beyond the schedule only edit, or check and correct."""
    schedule = schedule_of(config)
    return schedule + [0] * (num_steps_of(config) - len(schedule))


def num_per_step_of(config: BlockDiffusionGenerationConfig) -> int:
    """Masks that each step fills on an even schedule, rounded up."""
    return -(-config.block_length // config.num_steps_per_block)


def num_steps_of(config: BlockDiffusionGenerationConfig) -> int:
    """Steps a block may take, those that only edit or check among them."""
    num_steps = len(schedule_of(config))
    if config.editing_threshold is not None:
        num_steps += config.max_post_steps
    if config.remasking_threshold is not None:
        # Two that check, and those that fill in what is doubted.
        num_steps += config.max_remasking_rounds * (2 + -(-config.block_length // num_per_step_of(config)))
    return num_steps
