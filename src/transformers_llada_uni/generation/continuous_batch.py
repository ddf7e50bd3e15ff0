"""Text of many requests in one batch, which they join and leave at the ends of blocks."""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import StoppingCriteriaList

from ..input_checks import check_generator, check_integer, check_length, check_tensor, refuse_settings, split_rows
from .block_diffusion import BlockDiffusionGenerationMixin
from .cache import BlockDiffusionCache
from .canvas import Canvas
from .configuration import BlockDiffusionGenerationConfig, as_list, refuse_settings_of_images
from .decoding import warn_of_no_numbers
from .runners import EagerRunner
from .stopping import RowEnds


@dataclass(eq=False)
class TextRow:
    """
    What a request asks for, and what it has got.

    Attributes:
        prompt: Ids `(length,)`, without a mask token.
        max_new_tokens: Most tokens it may get.
        generator: For sampling.
        tokens: The new tokens so far, up to and with the first end token.
        is_finished: Whether no more will come.
        has_ended: Whether that is for an end token.
    """

    prompt: torch.Tensor
    max_new_tokens: int
    generator: torch.Generator
    tokens: list[int] = field(default_factory=list)
    is_finished: bool = False
    has_ended: bool = False


@dataclass
class _Rows:
    """Rows whose next block begins at the same column of one canvas; all before the block before it is cached."""

    rows: list[TextRow]
    canvas: Canvas
    cache: BlockDiffusionCache
    start: int
    runner: EagerRunner | None = None


class ContinuousBatch:
    r"""
    Generates text for rows that come and go. Each gets the tokens that `generate` would give it alone, but where the
    rounding of a batch decides between two.

        batch = ContinuousBatch(model, max_new_tokens=256)
        rows = [batch.add(ids) for ids in prompts]
        while batch.rows:
            batch.step()  # one block of every row; others may be added or removed in between
        texts = [tokenizer.decode(row.tokens) for row in rows]

    It is not made for several threads: who has them gives the batch one of its own.

    Args:
        model: With [`BlockDiffusionGenerationMixin`].
        generation_config ([`BlockDiffusionGenerationConfig`], *optional*): Default: that of the model.
        **kwargs: Any field of it, overriding it. `use_cache` must stay on, and the cache exact.

    Attributes:
        rows: Rows that are under work or wait for the next step.

    Raises:
        ValueError, TypeError: for a setting that is out of range.
    """

    def __init__(
        self,
        model: BlockDiffusionGenerationMixin,
        generation_config: BlockDiffusionGenerationConfig | None = None,
        **kwargs: Any,
    ):
        refuse_settings("ContinuousBatch", kwargs, {"max_length": "max_new_tokens", "num_return_sequences": "add"})
        refuse_settings_of_images("ContinuousBatch", kwargs)
        self.model = model
        self.config = model.settle_generation_config(generation_config, kwargs)
        for name in ("max_time", "stop_strings"):
            if getattr(self.config, name) is not None:
                raise ValueError(f"`{name}` cannot be had: who reads the rows' tokens removes a row when it is time.")
        if self.config.self_speculation:
            raise ValueError("`self_speculation=True` cannot be had: rows go on block by block, side by side.")
        if self.config.output_trajectory:
            raise ValueError(
                "`output_trajectory=True` cannot be had: rows come and go, and tell of their tokens only."
            )
        if self.config.use_cuda_graphs:
            raise ValueError("`use_cuda_graphs=True` cannot be had: rows come and go, and no two steps are alike.")
        self._decoder = model.make_decoder(self.config, None)
        settled = self._decoder.config  # without a cache under gradient checkpointing
        if not settled.use_cache or settled.cache_implementation == "sprint":
            raise ValueError("`use_cache` must be on and `cache_implementation` be exact: rows share what is cached.")
        self.rows: list[TextRow] = []
        self._waiting: list[TextRow] = []
        self._running: _Rows | None = None
        self._device = self._decoder.backbone.device
        end_ids = torch.tensor(as_list(self.config.eos_token_id), dtype=torch.long, device=self._device)
        self._row_ends = RowEnds(end_ids, end_ids[None], StoppingCriteriaList())

    def add(
        self,
        input_ids: torch.Tensor,
        max_new_tokens: int | None = None,
        generator: torch.Generator | None = None,
    ) -> TextRow:
        """
        Lets a row in with the next step.

        Args:
            input_ids: The prompt, `(length,)`; images in it as their codes.
            max_new_tokens: Default: that of the settings.
            generator: For `do_sample=True`. Default: one of its own, seeded by torch's.

        Raises:
            ValueError, TypeError: for ids that are no prompt, or too many tokens.
        """
        max_new_tokens = self.config.max_new_tokens if max_new_tokens is None else max_new_tokens
        check_integer("max_new_tokens", max_new_tokens, minimum=1)
        check_tensor("input_ids", input_ids, ndim=1)
        check_generator(None if generator is None else [generator], 1)
        limits = self.model.config.get_text_config()
        prompts = split_rows("input_ids", input_ids[None], None, limits.vocab_size)
        check_length("max_new_tokens", prompts, max_new_tokens, limits.max_position_embeddings)
        if self.config.mask_token_id in prompts[0].tolist():
            raise ValueError("`input_ids` must hold no mask token.")
        if generator is None:
            generator = torch.Generator()
            if self.config.do_sample:
                generator.manual_seed(int(torch.randint(2**63 - 1, ())))
        row = TextRow(prompts[0].to(self._device), max_new_tokens, generator)
        self.rows.append(row)
        self._waiting.append(row)
        return row

    def remove(self, row: TextRow) -> None:
        """Takes a row out before its end; nobody waits for it any more."""
        if row in self._waiting:
            self._waiting.remove(row)
        elif self._running is not None and row in self._running.rows:
            self._keep(self._running, [other for other in self._running.rows if other is not row])
        if row in self.rows:
            self.rows.remove(row)

    @torch.no_grad()
    def step(self) -> list[TextRow]:
        """
        Gives every row its next block.

        1. Let in the rows that wait.
        2. Fill in the block.
        3. Hand out its tokens; let go of the rows that have ended.

        Returns:
            The rows that have got tokens, those that have ended among them.
        """
        if not self.rows:
            return []
        # Triton launches kernels on the process's current device.
        with torch.cuda.device_of(self.rows[0].prompt):
            # 1. Let in the rows that wait.
            if self._waiting:
                self._running = self._let_in(self._running, self._waiting)
                self._waiting = []
            running = self._running
            assert running is not None  # it has the rows that do not wait
            # 2. Fill in the block.
            if running.runner is None:
                running.runner = self._make_runner(running)
            canvas, start, stop = running.canvas, running.start, running.start + self.config.block_length
            running.runner.fill(start, canvas.masked[:, start:stop].sum(dim=-1).tolist())
            running.start = stop
            has_ended = self._row_ends(canvas, running.runner.row_index, range(start, stop)).tolist()
        # 3. Hand out its tokens; let go of the rows that have ended.
        block = canvas.ids[0, :, start:stop].tolist()
        ends = canvas.prompt_end.tolist(), canvas.end.tolist()
        for row, tokens, first, last, is_end in zip(running.rows, block, *ends, has_ended, strict=True):
            row.tokens += tokens[max(first - start, 0) : max(last - start, 0)]
            row.has_ended = is_end
            row.is_finished = row.has_ended or last <= stop
        advanced = running.rows
        self.rows = [row for row in self.rows if not row.is_finished]
        if any(row.is_finished for row in advanced):
            warn_of_no_numbers(canvas)
            self._keep(running, [row for row in advanced if not row.is_finished])
        return advanced

    def _make_runner(self, running: _Rows) -> EagerRunner:
        return self._decoder.eager_runner(running.canvas, running.cache, [row.generator for row in running.rows])

    def _let_in(self, others: _Rows | None, rows: list[TextRow]) -> _Rows:
        """Lays out the new rows, forwards their prompts but for the last block, and puts them beside the others."""
        config, room = self.config, max(row.max_new_tokens for row in rows)
        assert config.mask_token_id is not None  # the settings were checked
        block_length = config.block_length
        canvas = Canvas.lay_out([[row.prompt for row in rows]], room, block_length, config.mask_token_id)
        canvas.end = canvas.prompt_end + torch.tensor([row.max_new_tokens for row in rows], device=self._device)
        cache = BlockDiffusionCache(self._decoder.backbone.config.num_hidden_layers, canvas.num_columns)
        new = _Rows(rows, canvas, cache, int(canvas.prompt_end.min()) // block_length * block_length)
        if others is None:
            return new
        self._make_runner(new).extend_prefix(cache, new.start - block_length)
        # Each is moved right until their next blocks fall together.
        parts, start = [others, new], max(others.start, new.start)
        shifts = [start - part.start for part in parts]
        length = max(part.canvas.num_columns + shift for part, shift in zip(parts, shifts, strict=True))
        canvases = [
            part.canvas.moved_right(shift, length, config.mask_token_id)
            for part, shift in zip(parts, shifts, strict=True)
        ]
        caches, counts = [part.cache for part in parts], [len(part.rows) for part in parts]
        cache = BlockDiffusionCache.side_by_side(caches, counts, shifts, start - block_length, length)
        return _Rows(others.rows + rows, Canvas.side_by_side(canvases), cache, start)

    def _keep(self, running: _Rows, rows: list[TextRow]) -> None:
        """Lets go of all other rows, and of the blocks that are padding to all that stay."""
        if not rows:
            self._running = None
            return
        canvas, block_length = running.canvas, self.config.block_length
        kept = torch.tensor([running.rows.index(row) for row in rows], device=self._device)
        first = int(canvas.padding[0, kept].min()) // block_length * block_length
        first = max(min(first, running.start - block_length), 0)
        last = -(-int(canvas.end[kept].max()) // block_length) * block_length
        cache = running.cache.select(kept, first, last)
        self._running = _Rows(rows, canvas.select(kept, first, last), cache, running.start - first)


__all__ = ["ContinuousBatch", "TextRow"]
