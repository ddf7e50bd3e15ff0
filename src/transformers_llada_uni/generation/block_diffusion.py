"""Generation by block diffusion: text, image codes with guidance, and both interleaved."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    StoppingCriteria,
)
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput, logging

from ..input_checks import (
    check_generator,
    check_grid,
    check_known_codes,
    check_length,
    check_streamer,
    split_rows,
)
from ..unwrapping import input_device
from .canvas import Canvas
from .configuration import (
    BlockDiffusionGenerationConfig,
    as_list,
    refuse_settings_of_images,
    refuse_settings_of_text,
)
from .decoding import BlockDiffusionDecoder
from .foreign_settings import settings_of
from .guidance_ramp import check_ramp
from .recording import recordings_of
from .sampling import Generators
from .settings import GenerationSettingsMixin
from .state import BlockState
from .stopping import RowEnds, make_criteria
from .trajectory import Trajectory, TrajectoryRecorder


logger = logging.get_logger(__name__)

Method = TypeVar("Method", bound=Callable[..., Any])


def runs_as_it_is(method: Method) -> Method:
    """
    Under `torch.compile(model.generate)` the loop, which goes by values of tensors, is not compiled. What gains by it
    can be all the same: `model.get_decoder().compile()`.
    """
    return torch.compiler.disable(method, reason="The loop of generation goes by values of tensors.")


@dataclass
class BlockDiffusionOutput(ModelOutput):
    """
    Args:
        sequences (`torch.LongTensor` of shape `(batch, prompt + new)`): Prompt and new tokens.
        num_forward_passes (`int`): Forward passes of the backbone.
        tokens_per_forward (`float`): New tokens of all rows, without what follows an end token, per forward pass.
        trajectory ([`Trajectory`], *optional*): With `output_trajectory=True`, how it was decoded.
    """

    sequences: torch.Tensor | None = None
    num_forward_passes: int | None = None
    tokens_per_forward: float | None = None
    trajectory: Trajectory | None = None


class BlockDiffusionGenerationMixin(GenerationSettingsMixin):
    """
    `generate` and its siblings for a model with a block-causal backbone (`get_decoder()`) and an `lm_head`.

    The sequence is cut into blocks. Block after block, all its masks are predicted at once, the surest predictions are
    committed, and the rest is predicted again (LLaDA, arXiv 2502.09992; block diffusion, arXiv 2503.09573).
    """

    output_modalities = ("text",)  # what pipelines of transformers may ask `generate` for

    lm_head: nn.Module  # what it is mixed into has it

    def get_decoder(self) -> PreTrainedModel:
        raise NotImplementedError

    def release_cuda_graphs(self) -> None:
        """Frees what generation keeps on a GPU from call to call: recorded steps and their buffers."""
        recordings_of(self.get_decoder()).release()

    @torch.no_grad()
    @runs_as_it_is
    def generate(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        streamer: BaseStreamer | None = None,
        generator: Generators = None,
        show_progress_bar: bool = False,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        stopping_criteria: list[StoppingCriteria] | None = None,
        tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        inputs: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | BlockDiffusionOutput:
        r"""
        Continues prompts with text, and fills in the mask tokens that stand in them.

        1. Settle the settings and check the arguments.
        2. Lay out prompts and room for the new tokens, aligned by block.
        3. Fill in block after block; stream what is finished.
        4. Cut every row where it ends.

        It takes what `generate` of transformers takes. What has no meaning here is refused by name, with the reason.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): Prompts, padded on the left. A mask
                token in a prompt is filled in too, seeing all that comes before it and the rest of its block. Default:
                `bos_token_id` alone.
            attention_mask (`torch.Tensor` of shape `(batch, length)`, *optional*): 0 for padding. Without it, of
                several rows the padding tokens that they begin with are taken for padding.
            generation_config ([`BlockDiffusionGenerationConfig`], *optional*): Default: that of the model. Of a
                [`~transformers.GenerationConfig`] what is set in it goes before the model's.
            streamer (`BaseStreamer`, *optional*): Gets the prompt, then every block as it is finished; one with
                `put_draft`, such as [`~transformers.TextDiffusionStreamer`], also what a block reads after each step,
                mask tokens where it has none yet. One row only.
            generator (`torch.Generator` or a list with one per row, *optional*): For `do_sample=True`.
            show_progress_bar (`bool`, defaults to `False`): Show a bar that counts tokens.
            pixel_values, image_grid_thw: Images whose places `input_ids` holds open, from the processor.
            stopping_criteria (`list[StoppingCriteria]`, *optional*): End a row with the first of its tokens for which
                one of them says so. See [`RowEnds`] for how they are asked.
            tokenizer (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*): For `stop_strings`.
            inputs (`torch.LongTensor`, *optional*): Another name of `input_ids`.
            kwargs: Any field of [`BlockDiffusionGenerationConfig`] but those of guidance, overriding it.

        Returns:
            `torch.LongTensor` of shape `(batch * num_return_sequences, length + new)`. Rows that end early are filled
            with the padding token. With `return_dict_in_generate=True` a [`BlockDiffusionOutput`].

        Raises:
            ValueError, TypeError: for an argument that is out of range or does not fit the others, before any work.
        """
        # 1. Settle the settings and check the arguments.
        config = self.settle_generation_config(generation_config, kwargs)
        named = dict(kwargs)
        if generation_config is not None and not isinstance(generation_config, BlockDiffusionGenerationConfig):
            named |= settings_of(generation_config)
        refuse_settings_of_images("generate", named)
        assert config.mask_token_id is not None  # it is settled
        if inputs is not None:
            if input_ids is not None:
                raise ValueError("`inputs` and `input_ids` are two names of the same: give one of them.")
            input_ids = inputs
        if input_ids is None:
            if config.bos_token_id is None:
                raise ValueError("`input_ids` are not given, and no `bos_token_id` is known to begin with.")
            input_ids = torch.tensor([[config.bos_token_id]], device=input_device(self.get_decoder()))
        prompts = self._split_rows("input_ids", input_ids, attention_mask)
        if config.max_length is not None:
            config.max_new_tokens = config.max_length - input_ids.shape[1]
            if config.max_new_tokens < 0:
                raise ValueError(
                    f"`max_length` is {config.max_length}, but `input_ids` have {input_ids.shape[1]} tokens already."
                )
        self._check_length("max_new_tokens", prompts, config.max_new_tokens)
        copies = config.num_return_sequences
        check_generator(generator, len(prompts) * copies)
        check_streamer(streamer, len(prompts) * copies)
        if config.max_new_tokens == 0 and not any(bool((row == config.mask_token_id).any()) for row in prompts):
            raise ValueError(
                "`max_new_tokens` is 0 and `input_ids` holds no mask token: there is nothing to generate."
            )
        end_ids = torch.tensor(as_list(config.eos_token_id), device=input_ids.device, dtype=torch.long)
        criteria = make_criteria(config, stopping_criteria, tokenizer)
        row_ends = RowEnds(end_ids, input_ids.repeat_interleave(copies, dim=0), criteria)
        decoder = self.make_decoder(config, generator, is_done=row_ends)

        input_ids = self.place_images({"input_ids": input_ids}, pixel_values, image_grid_thw)["input_ids"]

        # 2. Lay out prompts and room for the new tokens, aligned by block.
        prompts = repeat_rows(self._split_rows("input_ids", input_ids, attention_mask), copies)
        input_ids = input_ids.repeat_interleave(copies, dim=0)
        canvas = Canvas.lay_out([prompts], config.max_new_tokens, config.block_length, config.mask_token_id)

        # 3. Fill in block after block; stream what is finished.
        recorder = TrajectoryRecorder(canvas) if config.output_trajectory else None
        watchers: list[Callable[..., None]] = [] if recorder is None else [recorder]
        if streamer is not None:
            streamer.put(input_ids.cpu())
            if hasattr(streamer, "put_draft"):
                watchers.append(partial(put_draft, streamer.put_draft, canvas))
        decoder.on_step = call_each(watchers)
        with tqdm(total=config.max_new_tokens, unit="token", disable=not show_progress_bar) as progress:
            for block in decoder.run(canvas):
                start = max(block.start, int(canvas.prompt_end.min()))
                stop = min(block.stop, int(canvas.end.max()))
                progress.update(max(stop - start, 0))
                if streamer is not None and stop > start:
                    streamer.put(canvas.ids[0, 0, start:stop].cpu())
            progress.update(config.max_new_tokens - progress.n)  # answers may end early
        if streamer is not None:
            streamer.end()

        # 4. Cut every row where it ends.
        sequences, num_new_tokens = self._collect(canvas, input_ids, config)
        if not config.return_dict_in_generate:
            return sequences
        passes = decoder.num_forward_passes
        return BlockDiffusionOutput(
            sequences=sequences,
            num_forward_passes=passes,
            tokens_per_forward=num_new_tokens / passes,
            trajectory=None if recorder is None else recorder.trajectory(config.mask_token_id),
        )

    @torch.no_grad()
    @runs_as_it_is
    def generate_image_codes(
        self,
        input_ids: torch.Tensor,
        grid: tuple[int, int],
        attention_mask: torch.Tensor | None = None,
        negative_input_ids: torch.Tensor | None = None,
        negative_attention_mask: torch.Tensor | None = None,
        negative_image_input_ids: torch.Tensor | None = None,
        negative_image_attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        num_steps_per_block: int | None = None,
        image_codes: torch.Tensor | None = None,
        image_codes_mask: torch.Tensor | None = None,
        generation_config: BlockDiffusionGenerationConfig | None = None,
        generator: Generators = None,
        show_progress_bar: bool = False,
        callback: Callable[[int, int], None] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | BlockDiffusionOutput:
        r"""
        Generates the codes of one image per prompt, which ends with the header of the wanted grid.

        Guidance works on logits: `u + guidance_scale * (c - u) + image_guidance_scale * (u - n)` with c the prompt, u
        the prompt without text (or with a negative one) and n the prompt without image, then [`guided_logits`]'
        rescaling.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`): Prompts, padded on the left.
            grid (`tuple[int, int]`): Height and width in codes.
            attention_mask (`torch.Tensor`, *optional*): 0 for padding.
            negative_input_ids, negative_attention_mask: The negative prompts, without text, padded on the left.
            negative_image_input_ids, negative_image_attention_mask: The prompts without image, padded on the left;
                used where `image_guidance_scale` is not 0.
            pixel_values, image_grid_thw: Images whose places the prompts hold open, from the processor.
            num_steps_per_block (`int`, *optional*): Steps a block may take; default: those of `generation_config`, or
                8 without one (the model's own are for text).
            image_codes (`torch.LongTensor` of shape `(batch, H * W)`, *optional*): Known codes, for infilling.
            image_codes_mask (`torch.BoolTensor` of shape `(batch, H * W)`, *optional*): True where a code is to be
                generated anew; all others stay those of `image_codes`.
            generation_config, generator, show_progress_bar: As in [`generate`].
            callback (`Callable[[int, int], None]`, *optional*): Called after every block with the codes done and all.
            kwargs: Any field of [`BlockDiffusionGenerationConfig`], such as `guidance_scale`, overriding it.

        Returns:
            `torch.LongTensor` of shape `(batch * num_return_sequences, H * W)`, codes in raster order from 0 to
            `codebook_size - 1`; with `return_dict_in_generate=True` a [`BlockDiffusionOutput`] of them.

        Raises:
            ValueError, TypeError: for an argument that is out of range or does not fit the others, before any work.
        """
        # 1. Settle the settings and check the arguments.
        refuse_settings_of_text("generate_image_codes", kwargs)
        if num_steps_per_block is None:
            num_steps_per_block = getattr(generation_config, "num_steps_per_block", None) or 8
        of_codes = {"num_steps_per_block": num_steps_per_block, "self_speculation": False}
        config = self.settle_generation_config(generation_config, kwargs | of_codes)
        assert config.mask_token_id is not None  # it is settled
        text_config = self.config.get_text_config()
        offset = text_config.image_token_offset
        if offset is None:
            raise ValueError("This checkpoint has no image codes (`image_token_offset` is None).")
        num_codes = check_grid(grid)
        guidance_scale = guidance_scale_of(config, negative_input_ids)
        image_guidance_scale = config.image_guidance_scale
        if negative_input_ids is None and guidance_scale != 1.0:
            raise ValueError(f"`guidance_scale` is {guidance_scale}, but `negative_input_ids` are not given.")
        if image_guidance_scale != 0 and (negative_image_input_ids is None or negative_input_ids is None):
            raise ValueError(
                f"`image_guidance_scale` is {image_guidance_scale}, but `negative_input_ids` or "
                "`negative_image_input_ids` are not given."
            )
        is_guided = guidance_scale != 1.0 or image_guidance_scale != 0
        check_ramp(kwargs, is_guided)
        branches = {"input_ids": (input_ids, attention_mask)}
        for name, ids, mask, is_used in (
            ("negative_input_ids", negative_input_ids, negative_attention_mask, is_guided),
            (
                "negative_image_input_ids",
                negative_image_input_ids,
                negative_image_attention_mask,
                image_guidance_scale != 0,
            ),
        ):
            if ids is None and mask is not None:
                raise ValueError(f"The `attention_mask` of `{name}` is given without `{name}`.")
            if ids is not None and is_used:
                branches[name] = ids, mask
        for name, (ids, mask) in branches.items():
            self._check_length("grid", self._split_rows(name, ids, mask), num_codes)
            if ids.shape[0] != input_ids.shape[0]:
                raise ValueError(f"`{name}` has {ids.shape[0]} rows, but `input_ids` has {input_ids.shape[0]}.")
        copies = config.num_return_sequences
        check_generator(generator, input_ids.shape[0] * copies)
        if callback is not None and not callable(callback):
            raise TypeError(f"`callback` must be callable, got {type(callback).__name__}.")
        shape = (input_ids.shape[0], num_codes)
        known = check_known_codes(image_codes, image_codes_mask, shape, text_config.vocab_size - offset)
        decoder = self.make_decoder(
            config,
            generator,
            allowed=(offset, text_config.vocab_size),
            is_image=True,
            guidance=(guidance_scale, image_guidance_scale, config.guidance_rescale),
        )

        with_images = {name: ids for name, (ids, _) in branches.items() if name != "negative_image_input_ids"}
        with_images = self.place_images(with_images, pixel_values, image_grid_thw)

        # 2. Lay out all prompts and room for the codes, aligned by block; put known codes in their places.
        prompts = [
            repeat_rows(self._split_rows(name, with_images.get(name, ids), mask), copies)
            for name, (ids, mask) in branches.items()
        ]
        canvas = Canvas.lay_out(prompts, num_codes, config.block_length, config.mask_token_id)
        room = canvas.prompt_end[:, None] + torch.arange(num_codes, device=input_ids.device)
        if known is not None:
            codes, mask = (tensor.to(input_ids.device).repeat_interleave(copies, dim=0) for tensor in known)
            row_index, code_index = (~mask).nonzero(as_tuple=True)
            at = (row_index, room[row_index, code_index])
            canvas.ids[:, at[0], at[1]] = codes[row_index, code_index] + offset
            canvas.masked[at] = False

        # 3. Fill in block after block.
        recorder = TrajectoryRecorder(canvas) if config.output_trajectory else None
        decoder.on_step = recorder
        with tqdm(total=num_codes, unit="code", disable=not show_progress_bar) as progress:
            for block in decoder.run(canvas):
                done = min(max(block.stop - int(canvas.prompt_end.max()), 0), num_codes)
                progress.update(done - progress.n)
                if callback is not None:
                    callback(done, num_codes)

        # 4. Cut the codes out.
        codes = canvas.ids[0].gather(1, room) - offset
        if not config.return_dict_in_generate:
            return codes
        passes = max(decoder.num_forward_passes, 1)
        return BlockDiffusionOutput(
            sequences=codes,
            num_forward_passes=decoder.num_forward_passes,
            tokens_per_forward=codes.numel() / passes,
            trajectory=None if recorder is None else recorder.trajectory(config.mask_token_id),
        )

    def make_decoder(
        self, config: BlockDiffusionGenerationConfig, generator: Generators, **settings: Any
    ) -> BlockDiffusionDecoder:
        """
        The loop that generates by these settings, which are settled.

        Args:
            config: Of [`settle_generation_config`].
            generator: For sampling, one or one per row.
            **settings: Further arguments of [`BlockDiffusionDecoder`].

        Raises:
            ValueError: where CUDA graphs are asked for and cannot be had.
        """
        backbone = self.get_decoder()
        if config.use_cache and backbone.training and backbone.is_activation_checkpointing:
            logger.warning_once(
                "Gradient checkpointing drops caches: generating without one. Call `model.eval()` first."
            )
            config = copy.deepcopy(config)
            config.use_cache, config.cache_implementation, config.cache_config = False, "dynamic", None
        return BlockDiffusionDecoder(
            backbone,
            self.lm_head,
            config,
            self._never_predicted(config),
            generator=generator,
            image_token_offset=self.config.get_text_config().image_token_offset,
            **settings,
        )

    def _never_predicted(self, config: BlockDiffusionGenerationConfig) -> list[int]:
        # Pixels fill in placeholders: one that the model wrote would be taken for the place of a missing image.
        placeholder = getattr(self.config, "image_token_id", None)
        return [config.mask_token_id, *([] if placeholder is None else [placeholder])]

    def place_images(
        self,
        input_ids: dict[str, torch.Tensor],
        pixel_values: torch.Tensor | None,
        image_grid_thw: torch.Tensor | None,
    ) -> dict[str, torch.Tensor]:
        """
        Puts the tokens of images where the named ids hold places open, or raises, before any work, if these do not
        fit. A backbone alone has no eyes.
        """
        for name, value in (("pixel_values", pixel_values), ("image_grid_thw", image_grid_thw)):
            if value is not None:
                raise ValueError(f"`{name}` was given, but {type(self).__name__} has no vision tower.")
        return input_ids

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        """As peft looks for it in a model that generates (`task_type="CAUSAL_LM"`). Nothing here calls it."""
        return {"input_ids": input_ids, **kwargs}

    def _split_rows(
        self, name: str, input_ids: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> list[torch.Tensor]:
        config = self.config.get_text_config()
        return split_rows(name, input_ids, attention_mask, config.vocab_size, config.pad_token_id)

    def _check_length(self, name: str, prompts: list[torch.Tensor], num_new_tokens: int) -> None:
        check_length(name, prompts, num_new_tokens, self.config.get_text_config().max_position_embeddings)

    def _collect(
        self,
        canvas: Canvas,
        input_ids: torch.Tensor,
        config: BlockDiffusionGenerationConfig,
    ) -> tuple[torch.Tensor, int]:
        """Prompts as they were given (gaps filled in) with the new tokens, padded; and the number of new tokens."""
        fill = config.pad_token_id
        if fill is None:
            fill = next(iter(as_list(config.eos_token_id)), 0)
        rows = []
        for row, (prompt_end, end) in enumerate(zip(canvas.prompt_end.tolist(), canvas.end.tolist(), strict=True)):
            rows.append(canvas.ids[0, row, prompt_end:end])
        longest = max(len(row) for row in rows)
        sequences = torch.full((len(rows), input_ids.shape[1] + longest), fill, device=input_ids.device)
        sequences[:, : input_ids.shape[1]] = input_ids
        for row, new in enumerate(rows):
            length = int(canvas.prompt_end[row] - canvas.padding[0, row])
            prompt = canvas.ids[0, row, canvas.padding[0, row] : canvas.prompt_end[row]]
            sequences[row, input_ids.shape[1] - length : input_ids.shape[1]] = prompt
            sequences[row, input_ids.shape[1] : input_ids.shape[1] + len(new)] = new
        return sequences, sum(len(row) for row in rows)


def call_each(watchers: list[Callable[..., None]]) -> Callable[..., None] | None:
    """What sees every step, in one; `None` where nobody does."""
    if not watchers:
        return None

    def watch(*step: Any) -> None:
        for watcher in watchers:
            watcher(*step)

    return watch


def put_draft(
    put: Callable[[torch.Tensor], None], canvas: Canvas, block: BlockState, start: int, rows: torch.Tensor
) -> None:
    """Shows a streamer the new tokens of the block under work, `(1, n)`."""
    tokens, first = block.tokens[0], max(int(canvas.prompt_end[0]) - start, 0)
    if tokens[:, first:].numel():
        put(tokens[:, first : int(canvas.end[0]) - start].to("cpu", copy=True))


def repeat_rows(rows: list[torch.Tensor], copies: int) -> list[torch.Tensor]:
    """Each row so many times, one after the other."""
    return [row for row in rows for _ in range(copies)]


def guidance_scale_of(config: BlockDiffusionGenerationConfig, negative_input_ids: torch.Tensor | None) -> float:
    """What is set, or the default, which depends on whether there is a negative prompt."""
    if config.guidance_scale is not None:
        return config.guidance_scale
    return 1.0 if negative_input_ids is None else 2.0


__all__ = ["BlockDiffusionGenerationConfig", "BlockDiffusionGenerationMixin", "BlockDiffusionOutput"]
