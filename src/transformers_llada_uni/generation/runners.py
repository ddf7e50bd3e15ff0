"""Who runs the steps of a block: those that narrow them to what is left, and one whose steps all look alike."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask
from transformers.utils.generic import is_flash_attention_requested

from ..masking_block_causal import create_block_causal_mask
from .cache import BlockDiffusionCache
from .canvas import Canvas
from .recording import StaticBuffers
from .sampling import Generators
from .sprint import PrunedCache, SprintConfig, relative_key_norms, top_probabilities
from .state import BlockState
from .step import DenoisingStep, Mask


# A row that has nothing left to predict in a block is left out of the rest of its steps as soon as so large a share of
# the rows has: for that keys and values of the others are copied.
SHARE_LEFT_OUT = 1 / 8


def are_enough_to_leave_out(left: list[int]) -> bool:
    """Of what each row has left, whether so many have nothing that going on without them pays."""
    return left.count(0) >= max(SHARE_LEFT_OUT * len(left), 1)


class Runner:
    """
    Fills in blocks of a canvas.

    Args:
        canvas ([`Canvas`]): Filled in place.
        generator: For sampling, one or one per row.
        state ([`BlockState`]): Of the rows of the canvas.
        step ([`DenoisingStep`]): What a step does to it.

    Attributes:
        rows: Rows of the canvas that are under work.
        num_forward_passes: Forward passes of the backbone so far.
        on_step: Called after every step with the block, the column where it begins, and its rows of the canvas.
        guidance_weights: `(blocks, steps, rows)` of the whole canvas, where guidance changes from step to step.
    """

    on_step: Callable[[BlockState, int, torch.Tensor], None] | None = None
    guidance_weights: torch.Tensor | None = None

    def __init__(self, canvas: Canvas, generator: Generators, state: BlockState, step: DenoisingStep) -> None:
        self.canvas, self.generator, self.state, self.step = canvas, generator, state, step
        self.num_branches, num_rows, _ = canvas.ids.shape
        self.rows = list(range(num_rows))
        self.row_index = torch.arange(num_rows, device=canvas.ids.device)
        self.num_forward_passes = 0

    def fill(self, start: int, num_masked: list[int]) -> None:
        """
        Args:
            start: First column of the block.
            num_masked: Masks in it, of each row under work.
        """
        self.state.load(self.canvas, self.row_index, start)
        self.state.draw(self.generator, self.rows, num_masked, self.canvas.ids.shape[1])
        if self.state.guidance_weights is not None:
            assert self.guidance_weights is not None  # who makes such a state gives them
            weights = self.guidance_weights[start // self.step.block_length]
            self.state.guidance_weights.copy_(weights[:, self.row_index])
        policy = self.step.policy
        policy.begin(self.state)
        left = num_masked
        for index, count in enumerate(policy.counts_of_steps):
            if not any(left):
                break
            if index > 0:
                left = self.leave_out(start, left)
            self.run_step(start, index, max(left))
            if self.on_step is not None:
                self.on_step(self.state, start, self.row_index)
            # Where a block may end early the device is asked, once a step: the price of ending early.
            left = [max(num_left - count, 0) for num_left in left] if policy.is_scheduled else self.num_left()
        self.state.store(self.canvas, self.row_index, start)

    def run_step(self, start: int, index: int, num_left: int) -> None:
        """The step `index` of the block at `start`, in which no row has more than `num_left` masks."""
        raise NotImplementedError

    def num_left(self) -> list[int]:
        """Masks that each row has left in the block; a device is waited for."""
        raise NotImplementedError

    def leave_out(self, start: int, left: list[int]) -> list[int]:
        """May leave rows without masks out of the rest of the block's steps; returns what is left in the others."""
        return left

    def drop(self, indices: list[int]) -> None:
        """The rows of these indices (of `rows`) have ended; others go on."""
        raise NotImplementedError


class EagerRunner(Runner):
    """
    Computes what is left and no more: of the last layer and the head only the columns still masked, attention to what
    is written, rows that go on, of a block those that have masks left in it. Right everywhere: on CPUs, over several
    devices, with weights that travel.

    Args:
        canvas, generator, state, step: As above.
        backbone: The model without its head.
        cache ([`BlockDiffusionCache`], *optional*): The prefix. `None`: everything is forwarded in every step.

    Attributes:
        see_context: Called with the hidden states of what enters the prefix, `(branches, rows, columns, hidden)`.
    """

    see_context: Callable[[torch.Tensor], None] | None = None

    def __init__(
        self,
        canvas: Canvas,
        generator: Generators,
        state: BlockState,
        step: DenoisingStep,
        backbone: PreTrainedModel,
        cache: BlockDiffusionCache | None,
    ) -> None:
        super().__init__(canvas, generator, state, step)
        self.backbone, self.cache = backbone, cache
        # The plain loop, which the caches are held against, computes all that the release computes.
        self.leaves_out_rows = cache is not None
        self.block_length = self.step.block_length
        self._is_flash = is_flash_attention_requested(backbone.config)
        self._is_padded = bool(canvas.padding.any())
        self._mask: Mask | None = None
        self._mask_columns: tuple[int, int] | None = None

    def fill(self, start: int, num_masked: list[int]) -> None:
        with self.rows_put_back():
            super().fill(start, num_masked)

    @contextmanager
    def rows_put_back(self) -> Iterator[None]:
        """Rows that are left out within are there again behind it."""
        all_rows = self.rows, self.row_index, self.state, self.cache
        try:
            yield
        finally:  # who was stopped may go on
            if len(self.rows) < len(all_rows[0]):
                self.rows, self.row_index, self.state, self.cache = all_rows
                self._mask_columns = None

    def num_left(self) -> list[int]:
        return self.state.predicted.sum(dim=-1).tolist()

    def leave_out(self, start: int, left: list[int]) -> list[int]:
        if not self.leaves_out_rows or not are_enough_to_leave_out(left):
            return left
        self.state.store(self.canvas, self.row_index, start)
        self._keep([index for index, num_left in enumerate(left) if num_left], start + self.block_length)
        return [num_left for num_left in left if num_left]

    def run_step(self, start: int, index: int, num_left: int) -> None:
        canvas, cache = self.canvas, self.cache
        stop = start + self.block_length
        if cache is not None and self._is_flash:
            self.extend_prefix(cache, start)
        # A block's first step forwards whatever is not committed yet along with it (the prompt, or the block before it
        # with its final tokens) and commits that; so committing takes no pass of its own.
        first = 0 if cache is None else cache.get_seq_length()
        context = canvas.ids[:, self.row_index, first:start] if first < start else None
        # Only these columns are predicted; rows that have fewer than another are filled up with columns that are not.
        columns = (~self.state.predicted).to(torch.int8).argsort(dim=-1, stable=True)[:, :num_left]
        padding = canvas.padding[:, self.row_index]
        self.num_forward_passes += 1
        mask = self._attention_mask(first, stop)
        self.step(self.state, padding, cache, context, mask, columns, self.see_context)
        if cache is not None:
            cache.commit(start - first)

    def drop(self, indices: list[int]) -> None:
        self._keep([index for index in range(len(self.rows)) if index not in indices], self.canvas.num_columns)

    def _keep(self, indices: list[int], num_columns: int) -> None:
        """Goes on with the rows of these indices, and with a cache of so many columns."""
        kept = torch.tensor(indices, device=self.row_index.device)
        if self.cache is not None:
            branches = torch.arange(self.num_branches, device=self.row_index.device)[:, None] * len(self.rows)
            self.cache = self.cache.select((branches + kept).flatten(), 0, num_columns)
        self.rows, self.row_index = [self.rows[index] for index in indices], self.row_index[kept]
        self.state = self.state.select_rows(kept)
        self._mask_columns = None

    def extend_prefix(self, cache: BlockDiffusionCache, stop: int) -> None:
        """Forwards and commits what is not in the cache yet of all before column `stop`, where a block begins."""
        start = cache.get_seq_length()
        # Flash attention knows no block-causal mask: one block at a time.
        length = self.block_length if self._is_flash else max(stop - start, 1)
        for first in range(start, stop, length):
            tokens = self.canvas.ids[:, self.row_index, first : first + length]
            mask = self._attention_mask(first, first + length)
            self.num_forward_passes += 1
            hidden_states = self.step.forward(tokens, self.canvas.padding[:, self.row_index], cache, mask=mask)
            if self.see_context is not None:
                self.see_context(hidden_states)
            cache.commit(length)

    def _attention_mask(self, first: int, stop: int) -> Mask | None:
        """`None` where the backbone's own block-causal mask will do. Most steps of a block share one."""
        if not self._is_padded:
            return None
        if self._mask_columns != (first, stop):
            visible = self._visible(stop)
            block_start = torch.zeros_like(visible[:, 0], dtype=torch.long)
            self._mask = create_block_causal_mask(
                self.backbone.config,
                self._hidden_states_like(first, stop),
                visible,
                self.cache,
                self.block_length,
                block_start,
            )
            self._mask_columns = first, stop
        return self._mask

    def _hidden_states_like(self, first: int, stop: int) -> torch.Tensor:
        """What transformers' functions for masks read batch, length, dtype and device from."""
        batch_size, device = self.num_branches * len(self.rows), self.row_index.device
        return torch.empty(batch_size, stop - first, 0, dtype=self.backbone.dtype, device=device)

    def _visible(self, stop: int) -> torch.Tensor:
        """`(branches * rows, stop)`, false for padding."""
        columns = torch.arange(stop, device=self.row_index.device)
        return columns >= self.canvas.padding[:, self.row_index].flatten()[:, None]


class SprintRunner(EagerRunner):
    """
    SPRINT: after its first steps a block sees only the most important part of what is before it, see [`SprintConfig`].

    Args:
        canvas, generator, state, step, backbone, cache: As above.
        sprint ([`SprintConfig`]): The settings.
        head: Hidden states to logits.
        image_token_offset (`int`, *optional*): First image code, for separate ratios.
    """

    cache: BlockDiffusionCache  # a [`PrunedCache`] in a block's later steps

    def __init__(
        self,
        canvas: Canvas,
        generator: Generators,
        state: BlockState,
        step: DenoisingStep,
        backbone: PreTrainedModel,
        cache: BlockDiffusionCache,
        sprint: SprintConfig,
        head: nn.Module,
        image_token_offset: int | None,
    ) -> None:
        super().__init__(canvas, generator, state, step, backbone, cache)
        self.sprint, self.head, self.image_token_offset = sprint, head, image_token_offset
        self.confidence = torch.zeros(canvas.ids.shape, dtype=torch.float32, device=canvas.ids.device)
        self.leaves_out_rows = False  # what a block sees of the prefix is chosen for all rows at once

    def fill(self, start: int, num_masked: list[int]) -> None:
        whole = self.cache
        super().fill(start, num_masked)
        self.cache, self._mask_columns = whole, None

    def run_step(self, start: int, index: int, num_left: int) -> None:
        super().run_step(start, index, num_left)
        if start > 0 and index + 1 == self.sprint.cache_warmup_steps:
            self._prune(start)

    def see_context(self, hidden_states: torch.Tensor) -> None:
        """Notes how sure the model is of each token that enters the prefix."""
        first = self.cache.get_seq_length()
        stop = first + hidden_states.shape[2]
        wanted = self._visible(stop)[:, first:] & self.sprint.is_pruned(self._is_image(first, stop))
        if bool(wanted.any()):
            wanted = wanted.view(self.num_branches, -1, stop - first)
            confidence = wanted.to(torch.float32)
            probabilities = top_probabilities(self.head, hidden_states[wanted.to(hidden_states.device)])
            confidence[wanted] = probabilities.to(confidence.device)
            self.confidence[:, self.row_index, first:stop] = confidence

    def _prune(self, start: int) -> None:
        visible, alpha = self._visible(start), self.sprint.importance_alpha
        confidence = self.confidence[:, self.row_index, :start].flatten(0, 1)
        importance = alpha * relative_key_norms(self.cache, visible) + (1 - alpha) * confidence
        keep = self.sprint.choose(importance, self._is_image(0, start), visible)
        if not torch.equal(keep, visible):
            self.cache, self._mask_columns = PrunedCache(self.cache, keep, self.block_length), None

    def _is_image(self, first: int, stop: int) -> torch.Tensor:
        """`(branches * rows, stop - first)`, true for image codes."""
        ids = self.canvas.ids[:, self.row_index, first:stop].flatten(0, 1)
        offset = self.image_token_offset
        return torch.zeros_like(ids, dtype=torch.bool) if offset is None else ids >= offset

    def _attention_mask(self, first: int, stop: int) -> Mask | None:
        if not isinstance(self.cache, PrunedCache):
            return super()._attention_mask(first, stop)
        if self._mask_columns is None:
            visible = torch.cat([self.cache.is_real, self._visible(stop)[:, first:]], dim=-1)
            self._mask = None
            if not bool(visible.all()):
                self._mask = create_bidirectional_mask(
                    config=self.backbone.config,
                    inputs_embeds=self._hidden_states_like(first, stop),
                    attention_mask=visible,
                    past_key_values=self.cache,
                )
            self._mask_columns = first, stop
        return self._mask


class StaticRunner(Runner):
    """
    Steps of one shape at one place: each computes all columns of its block for all rows, also of those that have
    ended, and can be recorded. For GPUs, where a step costs what reading the weights costs.

    Args:
        canvas, generator: As above.
        buffers ([`StaticBuffers`]): Made for such a canvas.
    """

    def __init__(self, canvas: Canvas, generator: Generators, buffers: StaticBuffers) -> None:
        super().__init__(canvas, generator, buffers.state, buffers.step)
        self.buffers, self.cache = buffers, buffers.cache
        self.block_length = self.step.block_length
        buffers.padding.copy_(canvas.padding)

    def fill(self, start: int, num_masked: list[int]) -> None:
        self._extend_prefix(start)
        super().fill(start, num_masked)

    def num_left(self) -> list[int]:
        return [int(self.state.num_left)]  # of the row that has most

    def run_step(self, start: int, index: int, num_left: int) -> None:
        self.num_forward_passes += 1
        if index == 0 and self.cache.get_seq_length() < start:
            self.buffers.context.copy_(self.canvas.ids[:, :, start - self.block_length : start])
            self.buffers.run("step behind a finished block", self._step_behind_block)
            self.cache.commit(self.block_length)
        else:
            self.buffers.run("step", self._step)

    def drop(self, indices: list[int]) -> None:
        """The batch keeps its shape; nothing is left to predict in these rows."""
        self.canvas.masked[self.row_index[torch.tensor(indices, device=self.row_index.device)]] = False

    def _step(self) -> None:
        self.step(self.state, self.buffers.padding, self.cache)

    def _step_behind_block(self) -> None:
        self.step(self.state, self.buffers.padding, self.cache, self.buffers.context)

    def _extend_prefix(self, start: int) -> None:
        """Forwards what stands before a block, but for one finished block, which the first step takes along."""
        while (left := start - self.cache.get_seq_length()) > self.block_length:
            first = start - left
            length = next((length for length in self.buffers.pieces if length <= left), min(self.buffers.pieces))
            piece = self.buffers.pieces[length]
            # What reaches into the block and beyond is overwritten; nothing before it sees it.
            tokens = self.canvas.ids[:, :, first : first + length]
            piece.copy_(F.pad(tokens, (0, length - tokens.shape[-1])))
            self.num_forward_passes += 1
            self.buffers.run(f"prefix of {length}", partial(self._forward, piece))
            self.cache.commit(min(length, left))

    def _forward(self, piece: torch.Tensor) -> None:
        # Of the last layer only keys and values are needed: one column keeps its shapes simple.
        self.step.forward(piece, self.buffers.padding, self.cache, columns=self.buffers.first_columns)
