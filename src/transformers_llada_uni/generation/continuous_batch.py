"""Text of many requests in one batch, which they join and leave at the ends of blocks."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from ..input_checks import check_generator, check_integer, check_tensor, refuse_settings
from .block_diffusion import BlockDiffusionGenerationMixin, as_list
from .cache import BlockDiffusionCache
from .canvas import Canvas
from .configuration import BlockDiffusionGenerationConfig
from .decoding import BlockDiffusionDecoder, warn_of_no_numbers
from .runners import EagerRunner


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
class _Running:
    """Rows whose next block begins at the same position of one canvas; all before the block before it is cached."""

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
        self.model = model
        self.config = model._settle_generation_config(generation_config, kwargs)
        if not self.config.use_cache or self.config.cache_implementation == "sprint":
            raise ValueError("`use_cache` must be on and `cache_implementation` be exact: rows share what is cached.")
        if self.config.use_cuda_graphs:
            raise ValueError("`use_cuda_graphs=True` cannot be had: rows come and go, and no two steps are alike.")
        self.rows: list[TextRow] = []
        self._waiting: list[TextRow] = []
        self._running: _Running | None = None
        self._decoder = BlockDiffusionDecoder(
            model.get_decoder(), model.lm_head, self.config, model._never_predicted(self.config)
        )
        self._device = model.get_decoder().device
        self._end_ids = torch.tensor(as_list(self.config.eos_token_id), dtype=torch.long)

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
        prompts = self.model._split_rows("input_ids", input_ids[None], None)
        self.model._check_length("max_new_tokens", prompts, max_new_tokens)
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
        # 3. Hand out its tokens; let go of the rows that have ended.
        block = canvas.ids[0, :, start:stop].cpu()
        ends = canvas.prompt_end.tolist(), canvas.end.tolist()
        for row, tokens, first, last in zip(running.rows, block, *ends, strict=True):
            new = tokens[max(first - start, 0) : max(last - start, 0)]
            row.tokens += new[: self.model._length_with_end(new, self._end_ids)].tolist()
            row.has_ended = bool(torch.isin(new, self._end_ids).any())
            row.is_finished = row.has_ended or last <= stop
        advanced = running.rows
        self.rows = [row for row in self.rows if not row.is_finished]
        if any(row.is_finished for row in advanced):
            warn_of_no_numbers(canvas)
            self._keep(running, [row for row in advanced if not row.is_finished])
        return advanced

    def _make_runner(self, running: _Running) -> EagerRunner:
        canvas, head = running.canvas, self._decoder._guided_head(1)
        return EagerRunner(
            canvas,
            [row.generator for row in running.rows],
            self._decoder.backbone,
            running.cache,
            lambda num_rows: self._decoder._make_step(canvas, num_rows, head, None),
        )

    def _let_in(self, others: _Running | None, rows: list[TextRow]) -> _Running:
        """Lays out the new rows, forwards their prompts but for the last block, and puts them beside the others."""
        config, room = self.config, max(row.max_new_tokens for row in rows)
        assert config.mask_token_id is not None  # the settings were checked
        canvas = Canvas.lay_out([[row.prompt for row in rows]], room, config.block_length, config.mask_token_id)
        canvas.end = canvas.prompt_end + torch.tensor([row.max_new_tokens for row in rows], device=self._device)
        cache = BlockDiffusionCache(self._decoder.backbone.config.num_hidden_layers, canvas.num_columns)
        start = int(canvas.prompt_end.min()) // config.block_length * config.block_length
        new = _Running(list(rows), canvas, cache, start)
        if others is None:
            return new
        self._make_runner(new).extend_prefix(cache, start - config.block_length)
        return _side_by_side([others, new], config.block_length, config.mask_token_id)

    def _keep(self, running: _Running, rows: list[TextRow]) -> None:
        """Lets go of all other rows, and of the blocks that are padding to all that stay."""
        if not rows:
            self._running = None
            return
        canvas, block_length = running.canvas, self.config.block_length
        kept = torch.tensor([running.rows.index(row) for row in rows], device=self._device)
        first = int(canvas.padding[0, kept].min()) // block_length * block_length
        first = max(min(first, running.start - block_length), 0)
        last = -(-int(canvas.end[kept].max()) // block_length) * block_length
        canvas = Canvas(
            canvas.ids[:, kept, first:last],
            canvas.padding[:, kept] - first,
            canvas.masked[kept, first:last],
            canvas.prompt_end[kept] - first,
            canvas.end[kept] - first,
            canvas.confidence[kept, first:last],
        )
        for layer in running.cache.layers:
            layer.select_rows(kept)
            if layer.is_initialized:
                layer.keys, layer.values = layer.keys[:, :, first:last], layer.values[:, :, first:last]
            layer.length, layer.max_length = layer.length - first, last - first
        self._running = _Running(rows, canvas, running.cache, running.start - first)


def _side_by_side(parts: list[_Running], block_length: int, mask_token_id: int) -> _Running:
    """The rows of all parts on one canvas and one cache, each moved right until their next blocks fall together."""
    start = max(part.start for part in parts)
    shifts = [start - part.start for part in parts]
    length = max(part.canvas.num_columns + shift for part, shift in zip(parts, shifts, strict=True))
    moved = []
    for part, shift in zip(parts, shifts, strict=True):
        canvas, room = part.canvas, (shift, length - shift - part.canvas.num_columns)
        moved.append(
            Canvas(
                F.pad(canvas.ids, room, value=mask_token_id),
                canvas.padding + shift,
                # Beyond what a row has asked for all is to be generated, as alone.
                F.pad(F.pad(canvas.masked, (shift, 0)), (0, room[1]), value=True),
                canvas.prompt_end + shift,
                canvas.end + shift,
                F.pad(canvas.confidence, room, value=1.0),
            )
        )
    canvas = Canvas(
        torch.cat([one.ids for one in moved], dim=1),
        torch.cat([one.padding for one in moved], dim=1),
        torch.cat([one.masked for one in moved]),
        torch.cat([one.prompt_end for one in moved]),
        torch.cat([one.end for one in moved]),
        torch.cat([one.confidence for one in moved]),
    )
    rows = [row for part in parts for row in part.rows]
    cache = BlockDiffusionCache(len(parts[0].cache.layers), length)
    for index, layer in enumerate(cache.layers):
        layers = [part.cache.layers[index] for part in parts]
        like = next(one for one in layers if one.is_initialized)
        layer.lazy_initialization(
            *(states.new_empty(len(rows), *states.shape[1:]) for states in (like.keys, like.values))
        )
        first = 0
        for part, one, shift in zip(parts, layers, shifts, strict=True):
            if one.is_initialized:
                place = slice(first, first + len(part.rows)), slice(None), slice(shift, shift + one.length)
                layer.keys[place], layer.values[place] = one.keys[:, :, : one.length], one.values[:, :, : one.length]
            first += len(part.rows)
        layer.length = start - block_length
    return _Running(rows, canvas, cache, start)


__all__ = ["ContinuousBatch", "TextRow"]
