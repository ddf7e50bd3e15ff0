"""The loop of block diffusion over a canvas: rows of unequal prompts, guidance branches, cached or plain."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache
from transformers.masking_utils import create_bidirectional_mask
from transformers.utils.generic import is_flash_attention_requested

from .block_diffusion_cache import BlockDiffusionCache, SprintCache, SprintConfig, StaticBlockDiffusionCache
from .block_diffusion_sampling import (
    Generators,
    commit_schedule,
    make_warpers,
    predict_tokens,
    select_positions,
)
from .block_diffusion_token_editing import TokenEditing
from .generation_configuration import BlockDiffusionGenerationConfig
from .guided_head import GuidedHead
from .masking_block_causal import create_block_causal_mask


@dataclass
class Canvas:
    """
    Prompts and the room to be filled, laid out so that blocks of all rows and guidance branches fall together.

    A row is moved right by whole blocks until the block that holds its prompt's end is that of all other rows; so a
    block of the canvas is a block of the row, and a row in a batch equals the row alone. The companions of guidance
    are padded to the column where the conditional prompt ends. Padding is never seen, and positions start after it.

    Attributes:
        ids: `(branches, rows, columns)`.
        padding: `(branches, rows)`, columns of padding on the left.
        masked: `(rows, columns)`, true where a token is to be generated.
        prompt_end: `(rows,)`, first column after the prompt.
        end: `(rows,)`, first column after what is to be generated.
        confidence: `(rows, columns)`, the probability a token was committed with, 1 in prompts.
    """

    ids: torch.Tensor
    padding: torch.Tensor
    masked: torch.Tensor
    prompt_end: torch.Tensor
    end: torch.Tensor
    confidence: torch.Tensor

    @classmethod
    def lay_out(
        cls, branches: list[list[torch.Tensor]], num_new_tokens: int, block_length: int, mask_token_id: int
    ) -> "Canvas":
        """
        Args:
            branches: Per branch the unpadded prompts of all rows, each `(length,)`; the first is the conditional one,
                in which mask tokens are filled in too.
            num_new_tokens: Room after the prompt.
            block_length: Tokens in a block.
            mask_token_id: What the room is filled with.
        """
        device = branches[0][0].device
        prompt_end_blocks = 0
        for prompts in zip(*branches, strict=True):
            longest, tail = max(len(prompt) for prompt in prompts), len(prompts[0]) % block_length
            prompt_end_blocks = max(prompt_end_blocks, -(-(longest - tail) // block_length))
        prompt_end = [prompt_end_blocks * block_length + len(prompt) % block_length for prompt in branches[0]]
        num_columns = -(-(max(prompt_end) + num_new_tokens) // block_length) * block_length

        ids = torch.full((len(branches), len(prompt_end), num_columns), mask_token_id, device=device)
        padding = torch.zeros(len(branches), len(prompt_end), dtype=torch.long, device=device)
        for branch, prompts in enumerate(branches):
            for row, prompt in enumerate(prompts):
                padding[branch, row] = prompt_end[row] - len(prompt)
                ids[branch, row, prompt_end[row] - len(prompt) : prompt_end[row]] = prompt
        columns = torch.arange(num_columns, device=device)
        masked = (ids[0] == mask_token_id) & (columns >= padding[0][:, None])
        prompt_end = torch.tensor(prompt_end, device=device)
        return cls(
            ids, padding, masked, prompt_end, prompt_end + num_new_tokens, torch.ones_like(masked, dtype=torch.float32)
        )

    @property
    def num_columns(self) -> int:
        return self.ids.shape[-1]


@dataclass
class FinishedBlock:
    """What the loop yields after each block: its columns."""

    start: int
    stop: int


class BlockDiffusionDecoder:
    """
    Fills in a [`Canvas`], block by block, in place.

    Args:
        backbone: Ids to hidden states, with block-causal attention.
        head: Hidden states to logits.
        config: The settings.
        never_predicted: Ids that are not predicted: the mask, and the placeholder of codes that pixels will give.
        allowed: First and last-plus-one id that may be predicted. `None`: all.
        is_image: Use the rule for image codes, see [`select_positions`].
        guidance: `guidance_scale`, `image_guidance_scale`, `guidance_rescale`.
        generator: For sampling, one or one per row.
        is_done: From `(tokens (rows, block), is_new (rows, block))` to `(rows,)`: rows that end with this block.
        image_token_offset: First image code, for SPRINT's separate ratios.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        config: BlockDiffusionGenerationConfig,
        never_predicted: list[int],
        allowed: tuple[int, int] | None = None,
        is_image: bool = False,
        guidance: tuple[float, float, float] = (1.0, 0.0, 0.0),
        generator: Generators = None,
        is_done: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        image_token_offset: int | None = None,
    ):
        self.backbone, self.config = backbone, config
        self.head = GuidedHead(head, allowed, never_predicted, guidance)
        self.allowed, self.is_image = allowed, is_image
        self.generator, self.is_done, self.image_token_offset = generator, is_done, image_token_offset
        self.block_length = config.block_length
        self.is_static = config.use_cache and config.cache_implementation == "static"
        self.warpers = make_warpers(config.temperature, config.top_k, config.top_p) if config.do_sample else None
        self.num_forward_passes = 0

    def run(self, canvas: Canvas) -> Iterator[FinishedBlock]:
        """
        1. Make the cache.
        2. For every block from the first that holds a mask:
            a. for every step: forward what is not committed yet and the block, predict, commit the surest tokens;
            b. drop the rows that have ended.
        """
        # 1. Make the cache.
        num_branches, num_rows, num_columns = canvas.ids.shape
        cache = self._make_cache(canvas) if self.config.use_cache else None
        sprint = self.config.sprint_config() if isinstance(cache, SprintCache) else None
        self.rows = torch.arange(num_rows, device=canvas.ids.device)
        self._is_padded, self._mask, self._mask_columns = bool(canvas.padding.any()), None, None

        # 2. Walk the blocks.
        first_masked = int(canvas.masked.to(torch.long).argmax(dim=-1).min()) if bool(canvas.masked.any()) else 0
        for start in range(first_masked // self.block_length * self.block_length, num_columns, self.block_length):
            stop = start + self.block_length
            # 2.a. A block without a mask (known text between two gaps) is only context; the next step forwards it.
            if bool(canvas.masked[self.rows, start:stop].any()):
                self._fill_block(canvas, start, stop, cache, sprint)
            # 2.b. Drop the rows that have ended.
            ended = canvas.end[self.rows] <= stop
            if self.is_done is not None:
                columns = torch.arange(start, stop, device=self.rows.device)
                is_new = (columns >= canvas.prompt_end[self.rows, None]) & (columns < canvas.end[self.rows, None])
                ended |= self.is_done(canvas.ids[0, self.rows, start:stop], is_new)
            yield FinishedBlock(start, stop)
            if bool(ended.all()):
                return
            if bool(ended.any()) and self.is_static:
                # The batch keeps its shape; nothing is left to predict in these rows.
                ended_rows = self.rows[ended]
                canvas.masked[ended_rows, stop:] = False
                canvas.end[ended_rows] = canvas.end[ended_rows].clamp(max=stop)
            elif bool(ended.any()):
                if cache is not None:
                    kept = (~ended).repeat(num_branches).nonzero()[:, 0]
                    cache.select_rows(kept)
                self.rows = self.rows[~ended]

    def _make_cache(self, canvas: Canvas) -> BlockDiffusionCache:
        num_branches, num_rows, num_columns = canvas.ids.shape
        if self.is_static:
            return self._static_cache(num_branches * num_rows, num_columns, canvas.ids.device)
        # Three branches fall back from SPRINT to the exact cache, as in the release.
        is_sprint = self.config.cache_implementation == "sprint" and num_branches < 3
        cache_class = SprintCache if is_sprint else BlockDiffusionCache
        return cache_class(len(self.backbone.layers), num_columns)

    def _static_cache(self, batch_size: int, num_columns: int, device: torch.device) -> StaticBlockDiffusionCache:
        """That of earlier calls with as many rows, if it will do: graphs are recorded for its addresses."""
        kept, dtype = self.backbone.static_caches, self.backbone.dtype
        cache = kept.get(batch_size)
        if cache is None or not cache.will_do(num_columns, dtype, device):
            cache = StaticBlockDiffusionCache(self.backbone.config, batch_size, num_columns, dtype, device)
            kept[batch_size] = cache
        cache.reset()
        return cache

    def _fill_block(
        self, canvas: Canvas, start: int, stop: int, cache: Cache | None, sprint: SprintConfig | None
    ) -> None:
        config, rows = self.config, self.rows
        schedule = commit_schedule(self.block_length, config.num_steps_per_block)
        masked = canvas.masked[rows, start:stop]
        editing = None if config.editing_threshold is None else TokenEditing(config, masked)
        num_steps = len(schedule) + (0 if editing is None else config.max_post_steps)
        # Where nothing can be sure, the schedule alone tells how many are left; else the device must be asked, which
        # waits for it: the price of a block that ends early.
        is_scheduled = config.threshold >= 1 and editing is None and sprint is None
        predicted, num_kept = masked, int(masked.sum(dim=-1).max())
        for step in range(num_steps):
            if num_kept == 0:
                break
            count = schedule[step] if step < len(schedule) else 0  # steps beyond the schedule only edit
            # SPRINT: the last warm-up step shows which part of the prefix the others need.
            if sprint is not None and start > 0 and step + 1 == sprint.cache_warmup_steps:
                cache.observe(self._visible(canvas, stop), self.block_length)
            # Only these columns are predicted; rows that have fewer than another are filled up with columns that are
            # not. They stay in order, which sampling goes by. A static step computes the other columns too.
            order = (~predicted).to(torch.int8).argsort(dim=-1, stable=True)
            columns = order[:, :num_kept]
            computed = order if self.is_static else columns
            hidden_states = self._forward(canvas, start, stop, cache, computed)  # (branches, rows, computed, hidden)
            if sprint is not None and start > 0 and step + 1 == sprint.cache_warmup_steps:
                self._prune(canvas, start, cache, sprint)
            if self.warpers is None:
                kept_index = torch.arange(num_kept, device=columns.device).repeat(len(rows))
                row_index = torch.arange(len(rows), device=columns.device).repeat_interleave(num_kept)
            else:
                # A row in a batch draws no more random numbers than the row alone.
                row_index, kept_index = predicted.gather(-1, columns).nonzero(as_tuple=True)
            column_index = columns[row_index, kept_index]
            logits = self.head(hidden_states[:, row_index, kept_index])
            tokens, probabilities, ranking = predict_tokens(
                logits,
                rows[row_index],
                self.warpers,
                self.generator,
                "low_confidence" if sprint is None else sprint.confidence,
            )
            if self.allowed is not None:
                tokens = tokens + self.allowed[0]
            block_probabilities = torch.zeros(masked.shape, dtype=probabilities.dtype, device=masked.device)
            block_ranking = block_probabilities.clone()
            block_probabilities[row_index, column_index] = probabilities
            block_ranking[row_index, column_index] = ranking
            if sprint is not None and step < len(schedule):
                count = torch.ceil(masked.sum(dim=-1) / (len(schedule) - step))
            commit = select_positions(
                masked,
                block_ranking,
                block_probabilities,
                count,
                config.threshold,
                at_least_count=self.is_image or sprint is not None,
            )
            block_tokens, block_confidence = canvas.ids[:, rows, start:stop], canvas.confidence[rows, start:stop]
            new_tokens = block_tokens[0].index_put((row_index, column_index), tokens)
            changed = commit
            if editing is not None:
                changed = commit | editing.edit(masked, commit, block_tokens[0], new_tokens, block_probabilities)
            # All branches take the same tokens.
            canvas.ids[:, rows, start:stop] = torch.where(changed, new_tokens, block_tokens)
            canvas.confidence[rows, start:stop] = torch.where(
                changed, block_probabilities.to(block_confidence.dtype), block_confidence
            )
            masked = masked & ~commit
            predicted = masked if editing is None else editing.columns()
            num_kept = max(num_kept - count, 0) if is_scheduled else int(predicted.sum(dim=-1).max())
        canvas.masked[rows, start:stop] = masked
        if isinstance(cache, SprintCache):
            cache.restore()

    def _forward(
        self, canvas: Canvas, start: int, stop: int, cache: Cache | None, columns: torch.Tensor
    ) -> torch.Tensor:
        """
        Hidden states of these columns of the block, `(rows, kept)`: `(branches, rows, kept, hidden)`.

        A block's first step forwards whatever is not committed yet along with it (the prompt, or the block before it
        with its final tokens) and commits that; so committing takes no pass of its own.
        """
        first = 0 if cache is None else cache.get_seq_length()
        if cache is not None and is_flash_attention_requested(self.backbone.config):
            # Flash attention knows no block-causal mask: one block at a time.
            for block in range(first, start, self.block_length):
                self._forward_columns(canvas, block, block + self.block_length, cache)
                cache.commit(self.block_length)
            first = start
        num_branches = canvas.ids.shape[0]
        columns_to_keep = (columns + (start - first)).repeat(num_branches, 1)
        if cache is None:
            # The plain loop, which the caches are held against, computes all that the release computes.
            hidden_states = self._forward_columns(canvas, first, stop, cache)
            hidden_states = hidden_states.take_along_dim(columns_to_keep[..., None], dim=1)
        else:
            hidden_states = self._forward_columns(canvas, first, stop, cache, columns_to_keep)
            cache.commit(start - first)
        return hidden_states.unflatten(0, (num_branches, -1))

    def _forward_columns(
        self,
        canvas: Canvas,
        first: int,
        stop: int,
        cache: Cache | None,
        columns_to_keep: torch.Tensor | None = None,
    ) -> torch.Tensor:
        self.num_forward_passes += 1
        padding = canvas.padding[:, self.rows].flatten()
        columns = torch.arange(first, stop, device=canvas.ids.device)
        forward = self.backbone
        if self.is_static and stop - first > 2 * self.block_length:
            forward = self.backbone._call_impl  # a prompt, not compiled: a graph of fixed shapes would serve no other
        outputs = forward(
            input_ids=canvas.ids[:, self.rows, first:stop].flatten(0, 1),
            attention_mask=self._attention_mask(canvas, first, stop, cache),
            position_ids=(columns - padding[:, None]).clamp(min=0),
            past_key_values=cache,
            use_cache=False,
            block_length=self.block_length,
            columns_to_keep=columns_to_keep,
        )
        return outputs.last_hidden_state

    def _attention_mask(self, canvas: Canvas, first: int, stop: int, cache: Cache | None):
        """`None` where the backbone's own block-causal mask will do. Most steps of a block share one."""
        is_pruned = isinstance(cache, SprintCache) and cache.kept_is_real is not None
        if not (self._is_padded or is_pruned or self.is_static):
            return None
        if self._mask_columns != (first, stop, is_pruned):
            self._mask = self._make_attention_mask(canvas, first, stop, cache, is_pruned)
            self._mask_columns = (first, stop, is_pruned)
        return self._mask

    def _make_attention_mask(self, canvas: Canvas, first: int, stop: int, cache: Cache | None, is_pruned: bool):
        visible = self._visible(canvas, stop)
        shape = torch.empty(visible.shape[0], stop - first, 0, dtype=self.backbone.dtype, device=visible.device)
        if is_pruned:
            visible = torch.cat([cache.kept_is_real, visible[:, first:]], dim=-1)
            if bool(visible.all()):
                return None
            return create_bidirectional_mask(
                config=self.backbone.config, inputs_embeds=shape, attention_mask=visible, past_key_values=cache
            )
        if self.is_static:
            not_written = cache.get_mask_sizes(stop - first, 0)[0] - stop
            visible = F.pad(visible, (0, not_written))
        block_start = torch.zeros_like(visible[:, 0], dtype=torch.long)
        return create_block_causal_mask(self.backbone.config, shape, visible, cache, self.block_length, block_start)

    def _visible(self, canvas: Canvas, stop: int) -> torch.Tensor:
        """`(branches * rows, stop)`, false for padding."""
        columns = torch.arange(stop, device=canvas.ids.device)
        return columns >= canvas.padding[:, self.rows].flatten()[:, None]

    def _prune(self, canvas: Canvas, start: int, cache: SprintCache, sprint: SprintConfig) -> None:
        num_branches = canvas.ids.shape[0]
        prefix = canvas.ids[:, self.rows, :start].flatten(0, 1)
        is_image = torch.zeros_like(prefix, dtype=torch.bool)
        if self.image_token_offset is not None:
            is_image = prefix >= self.image_token_offset
        confidence = canvas.confidence[self.rows, :start].repeat(num_branches, 1)
        cache.prune(sprint, confidence, is_image, self._visible(canvas, start))
