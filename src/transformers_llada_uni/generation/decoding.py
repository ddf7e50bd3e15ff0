"""The loop of block diffusion over a canvas: block after block, rows of unequal prompts, guidance, cached or plain."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .cache import BlockDiffusionCache
from .canvas import Canvas
from .configuration import BlockDiffusionGenerationConfig, as_list
from .credit import CreditDecoding
from .guidance_ramp import first_guided_block, guidance_weights
from .guided_head import GuidedHead
from .policy import CommitPolicy, counts_of_steps, num_steps_of
from .recording import (
    GraphPool,
    StaticBuffers,
    fingerprint_of,
    recordings_of,
    release_unused,
    why_not_recorded,
    why_not_static,
)
from .runners import EagerRunner, Runner, SprintRunner, StaticRunner
from .sampling import Generators, make_warpers
from .self_speculation import SelfSpeculationRunner, num_spare_columns
from .sprint import SprintConfig
from .state import BlockState
from .step import DenoisingStep


logger = logging.get_logger(__name__)


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
        is_done: From `(canvas, rows, columns of a finished block)` to `(rows,)`: rows that end with this block.
        image_token_offset: First image code, for SPRINT's separate ratios.
        on_step: Called after every step with the block, the column where it begins, and its rows of the canvas.

    Raises:
        ValueError: for `use_cuda_graphs=True` where they cannot be had, `self_speculation=True` without a cache.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        head: nn.Module,
        config: BlockDiffusionGenerationConfig,
        never_predicted: list[int],
        allowed: tuple[int, int] | None = None,
        is_image: bool = False,
        guidance: tuple[float, float, float] = (1.0, 0.0, 0.0),
        generator: Generators = None,
        is_done: Callable[[Canvas, torch.Tensor, range], torch.Tensor] | None = None,
        image_token_offset: int | None = None,
        on_step: Callable[[BlockState, int, torch.Tensor], None] | None = None,
    ):
        self.backbone, self.head, self.config = backbone, head, config
        self.never_predicted, self.allowed, self.is_image = never_predicted, allowed, is_image
        self.guidance, self.generator, self.is_done = guidance, generator, is_done
        self.image_token_offset, self.on_step = image_token_offset, on_step
        self.block_length = config.block_length
        self.num_forward_passes = 0
        self.why_not_static = why_not_static(backbone, head)
        self.why_not_recorded = self.why_not_static or why_not_recorded(backbone, head)
        if config.use_cuda_graphs and self.why_not_recorded is not None:
            raise ValueError(f"`use_cuda_graphs=True` cannot be had: {self.why_not_recorded}.")
        if config.self_speculation and not config.use_cache:
            raise ValueError("`self_speculation=True` needs a cache, which gradient checkpointing drops.")

    def run(self, canvas: Canvas) -> Iterator[range]:
        """
        Yields the columns of each block that is finished.

        1. Find the blocks: from the first that holds a mask to the first that is guided, and from there on.
        2. Fill in those that are not guided yet by the prompt alone.
        3. Fill in the others by all branches.
        4. Say if what was generated means nothing.
        """
        # 1. Find the blocks.
        # What stands in the way of a block's masks is known from the canvas; the device is not asked again.
        num_masked, ends = canvas.num_masked(self.block_length), canvas.end.tolist()
        first_block = min((next((i for i, n in enumerate(row) if n), len(row)) for row in num_masked), default=0)
        weights, first_guided = None, first_block
        if self._is_ramped(canvas):
            weights = self._guidance_weights(canvas)
            first_guided = max(first_block, first_guided_block(weights))
        num_blocks = canvas.num_columns // self.block_length
        unguided, others = range(first_block, first_guided), range(first_guided, num_blocks)
        live = list(range(len(ends)))
        # Triton launches kernels on the process's current device.
        with torch.cuda.device_of(canvas.ids):
            # 2. Fill in those that are not guided yet by the prompt alone.
            if unguided:
                yield from self._fill(canvas.conditional(), unguided, num_masked, ends, live)
                canvas.share_new_tokens()
            # 3. Fill in the others by all branches; what these have before them is forwarded only now.
            if others and live:
                yield from self._fill(canvas, others, num_masked, ends, live, weights)
        # 4. Say if what was generated means nothing.
        warn_of_no_numbers(canvas)

    def _fill(
        self,
        canvas: Canvas,
        blocks: range,
        num_masked: list[list[int]],
        ends: list[int],
        live: list[int],
        weights: torch.Tensor | None = None,
    ) -> Iterator[range]:
        """
        Yields the columns of each of the blocks that is finished, and takes rows that have ended out of `live`.

        1. Choose who runs the steps, and on which cache.
        2. For every block:
            a. fill it in;
            b. leave out the rows that have ended.
        """
        # 1. Choose who runs the steps, and on which cache.
        with self._runner(canvas) as runner:
            runner.on_step, num_passes_before = self.on_step, self.num_forward_passes
            runner.guidance_weights = None if weights is None else weights.to(canvas.ids.device)
            if ended := [index for index, row in enumerate(runner.rows) if row not in live]:
                runner.drop(ended)
            # 2. Walk the blocks.
            for block in blocks:
                start, stop = block * self.block_length, (block + 1) * self.block_length
                # 2.a. A block without a mask (known text between two gaps) is only context; the next step forwards it.
                counts = [num_masked[row][block] if row in live else 0 for row in runner.rows]
                if any(counts):
                    runner.fill(start, counts)
                    self.num_forward_passes = num_passes_before + runner.num_forward_passes
                # 2.b. Leave out the rows that have ended.
                is_done = self._rows_done(canvas, runner, start, stop)
                ended = [
                    index
                    for index, row in enumerate(runner.rows)
                    if row in live and (ends[row] <= stop or is_done[index])
                ]
                yield range(start, stop)
                for index in ended:
                    live.remove(runner.rows[index])
                if not live:
                    break
                if ended:
                    runner.drop(ended)

    def _is_ramped(self, canvas: Canvas) -> bool:
        """Whether guidance changes from step to step."""
        return self.config.guidance_ramp is not None and len(canvas.ids) > 1

    def _guidance_weights(self, canvas: Canvas) -> torch.Tensor:
        assert self.config.guidance_ramp is not None
        return guidance_weights(self.config.guidance_ramp, canvas, self.block_length, counts_of_steps(self.config))

    def _rows_done(self, canvas: Canvas, runner: Runner, start: int, stop: int) -> list[bool]:
        if self.is_done is None:
            return [False] * len(runner.rows)
        return self.is_done(canvas, runner.row_index, range(start, stop)).tolist()

    @contextmanager
    def _runner(self, canvas: Canvas) -> Iterator[Runner]:
        config, backbone = self.config, self.backbone
        num_branches, num_rows, num_columns = canvas.ids.shape
        # Three branches fall back from SPRINT to the exact cache, as in the release; also where one is run alone.
        is_sprint = config.cache_implementation == "sprint" and self.guidance[1] == 0
        sprint = config.sprint_config() if config.use_cache and is_sprint else None
        is_exact = config.use_cache and sprint is None

        if self.why_not_static is not None:
            release_unused(backbone)
        if config.self_speculation:
            spare = num_spare_columns(self.block_length)
            cache = BlockDiffusionCache(backbone.config.num_hidden_layers, num_columns + spare)
            state, step = self._make_step(canvas, self._guided_head(num_branches), None)
            assert config.mask_token_id is not None  # it is settled
            ids = config.mask_token_id, as_list(config.eos_token_id)
            yield SelfSpeculationRunner(canvas, self.generator, state, step, backbone, cache, *ids)
            return
        if not is_exact or self.why_not_static is not None:
            cache = BlockDiffusionCache(backbone.config.num_hidden_layers, num_columns)
            if sprint is None:
                yield self.eager_runner(canvas, cache if config.use_cache else None, self.generator)
            else:
                state, step = self._make_step(canvas, self._guided_head(num_branches), sprint)
                of_block = canvas, self.generator, state, step
                yield SprintRunner(*of_block, backbone, cache, sprint, self.head, self.image_token_offset)
            return

        with torch.inference_mode(False):  # what is kept must do for calls outside of it as well
            head = self._guided_head(num_branches)

        def make_buffers(pool: GraphPool | None) -> StaticBuffers:
            state, step = self._make_step(canvas, head, None)
            return StaticBuffers(backbone, state, step, num_columns, pool)

        if config.use_cuda_graphs is False or self.why_not_recorded is not None:
            yield StaticRunner(canvas, self.generator, make_buffers(None))
            return
        kind = (*self._kind(canvas), None if head.spread_matrix is None else head.spread_matrix.data_ptr())
        fingerprint = fingerprint_of(backbone, self.head)
        with recordings_of(backbone).borrow(kind, fingerprint, num_columns, make_buffers) as buffers:
            yield StaticRunner(canvas, self.generator, buffers)

    def eager_runner(self, canvas: Canvas, cache: BlockDiffusionCache | None, generator: Generators) -> EagerRunner:
        """Who fills in blocks of a canvas behind what a cache holds of it, where rows may come and go in between."""
        state, step = self._make_step(canvas, self._guided_head(len(canvas.ids)), None)
        return EagerRunner(canvas, generator, state, step, self.backbone, cache)

    def _kind(self, canvas: Canvas) -> tuple:
        """All that a recorded step holds fixed, but for the model."""
        config = self.config
        schedule = (config.block_length, config.num_steps_per_block, config.masking_schedule)
        policy = (*schedule, config.threshold, config.credit_alpha)
        editing = (config.editing_threshold, config.max_post_steps)
        remasking = (config.remasking_threshold, config.max_remasking_rounds, config.mask_token_id)
        sampling = (config.temperature, config.top_k, config.top_p) if config.do_sample else None
        # The weights of a ramp are in a tensor.
        guidance = (*self.guidance, self._is_ramped(canvas)) if len(canvas.ids) > 1 else None
        head = (self.allowed, tuple(self.never_predicted))
        shape = (*canvas.ids.shape[:2], canvas.ids.device)
        return shape, policy, editing, remasking, sampling, guidance, head, self.is_image

    def _guided_head(self, num_branches: int) -> GuidedHead:
        return GuidedHead(self.head, self.allowed, self.never_predicted, self.guidance, num_branches)

    def _make_step(
        self, canvas: Canvas, head: GuidedHead, sprint: SprintConfig | None
    ) -> tuple[BlockState, DenoisingStep]:
        config, device = self.config, canvas.ids.device
        warpers = make_warpers(config.temperature, config.top_k, config.top_p) if config.do_sample else None
        num_branches, num_rows, _ = canvas.ids.shape
        credit = None if config.credit_alpha is None else CreditDecoding(config.credit_alpha)
        state = BlockState(
            num_branches,
            num_rows,
            self.block_length,
            num_steps_of(config),
            device,
            is_sampled=config.do_sample,
            has_credits=credit is not None,
            has_guidance_weights=self._is_ramped(canvas),
        )
        policy = CommitPolicy(config, device, self.is_image, sprint)
        confidence = "low_confidence" if sprint is None else sprint.confidence
        settings = self.allowed, warpers, confidence, credit
        return state, DenoisingStep(self.backbone, head, policy, self.block_length, *settings)


def warn_of_no_numbers(canvas: Canvas) -> None:
    """
    Where a logit is NaN or infinite, the probability that its token is committed with is NaN. To be asked once, at the
    end: the device is waited for.
    """
    if (count := int(canvas.confidence.isnan().sum())) > 0:
        logger.warning(
            "At %d positions logits were infinite or no numbers (NaN): what was generated there means nothing. Look "
            "for such weights, for a dtype that is too narrow (float16), or for too large a `guidance_scale`.",
            count,
        )
