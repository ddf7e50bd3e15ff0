"""Prompts and pictures -> image codes: the half of the pipeline that is the language model's."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import PIL.Image
import torch
from accelerate.hooks import CpuOffload
from transformers.image_processing_utils import BatchFeature

from transformers_llada_uni import BlockDiffusionGenerationConfig

from .input_checks import (
    check_finite,
    check_flag,
    check_integer,
    check_settings,
    check_side,
    require_components,
)
from .picture_inputs import touched_codes


Generator = torch.Generator | list[torch.Generator] | None

DEFAULT_MAX_THINKING_TOKENS = 1024
DEFAULT_GUIDANCE_SCALE = 2.0
# Codes that are generated at once, those of 64 pictures of 1024 x 1024. By then each expert gets so many tokens that a
# larger batch is hardly faster, and keys and values take 5 GB: 41 kB of bfloat16 for each code and branch of guidance.
MAX_CODES = 65_536
# Tokens of `<|image|>`, height, width and `<boi>` before the codes.
HEADER_LENGTH = 4


@dataclass
class CodeGenerationSettings:
    """How the language model generates image codes; fields as in the pipeline's call."""

    guidance_scale: float | None
    image_guidance_scale: float
    guidance_rescale: float
    num_steps_per_block: int
    generation_kwargs: dict[str, Any] | None


@dataclass
class PromptGroup:
    """Prompts for pictures of one grid, which the language model takes as one batch: at most [`MAX_CODES`]."""

    rows: list[int]
    inputs: BatchFeature
    grid: tuple[int, int]
    touched: torch.BoolTensor | None = None  # (rows, H * W), the codes to make anew
    num_pictures: list[int] | None = None  # of each row


@contextmanager
def _sizes_at(upscale: int) -> Iterator[None]:
    """Errors of the processor name sizes at `upscale` 2; at another they must say so."""
    try:
        yield
    except ValueError as error:
        if upscale == 2:
            raise
        raise ValueError(f"{error} (Sizes in this message are at `upscale` 2; at {upscale} they are half.)") from error


def _batches(rows: list[int], grid: tuple[int, int]) -> list[list[int]]:
    """The rows in their order, those that are generated at once together."""
    size = max(1, MAX_CODES // math.prod(grid))
    return [rows[first : first + size] for first in range(0, len(rows), size)]


class CodeGenerationMixin:
    """What a `DiffusionPipeline` with the components `model` and `processor` needs to generate image codes."""

    def _check_generation(self, settings: CodeGenerationSettings) -> None:
        require_components(self, ["model", "processor"], "generate image codes")
        if settings.guidance_scale is not None:
            check_finite("guidance_scale", settings.guidance_scale, minimum=0.0)
        check_finite("image_guidance_scale", settings.image_guidance_scale, minimum=0.0)
        check_finite("guidance_rescale", settings.guidance_rescale, minimum=0.0, maximum=1.0)
        check_integer("num_steps_per_block", settings.num_steps_per_block, minimum=1)
        check_settings("generation_kwargs", settings.generation_kwargs, BlockDiffusionGenerationConfig)

    def _check_task(
        self,
        image: Any,
        mask_image: Any,
        size: tuple[int | None, int | None],
        thinking: bool,
        image_guidance_scale: float,
        thinking_kwargs: dict[str, Any] | None,
    ) -> None:
        """Arguments that must fit each other."""
        check_flag("thinking", thinking)
        check_settings("thinking_kwargs", thinking_kwargs, BlockDiffusionGenerationConfig)
        if thinking_kwargs and not thinking:
            raise ValueError("`thinking_kwargs` are given, but `thinking` is False.")
        if image is None and mask_image is not None:
            raise ValueError("`mask_image` needs the `image` it belongs to.")
        if image is None and image_guidance_scale:
            raise ValueError("`image_guidance_scale` needs an `image` to be guided by.")
        if image is not None and thinking:
            raise ValueError("`thinking` is for text-to-image; it cannot be combined with `image`.")
        if image is not None and (size[0] is None) != (size[1] is None):
            raise ValueError("`height` and `width` must be given together with `image`, or neither.")
        if mask_image is not None and size != (None, None):
            raise ValueError("`height` and `width` cannot be given with `mask_image`: the codes around the mask stay.")

    def _grid(self, height: int | None, width: int | None, upscale: int) -> tuple[int, int]:
        """The grid (H, W) of codes of a picture of so many pixels."""
        side = self.processor.image_processor.patch_size * upscale
        default = self.processor.default_side
        rows = check_side("height", default if height is None else height, multiple=side) // side
        columns = check_side("width", default if width is None else width, multiple=side) // side
        return rows, columns

    def _write_prompts(
        self, texts: list[str], grid: tuple[int, int], thinking: bool, upscale: int
    ) -> list[PromptGroup]:
        """Prompts of text-to-image; with thinking they end where the thoughts begin."""
        # The processor speaks of pixels at twice the resolution of the image tokenizer.
        side = 2 * self.processor.image_processor.patch_size
        task = "thinking" if thinking else "text_to_image"
        groups = []
        for rows in _batches(list(range(len(texts))), grid):
            with _sizes_at(upscale):
                inputs = self.processor(
                    text=[texts[row] for row in rows], task=task, height=side * grid[0], width=side * grid[1]
                )
            groups.append(PromptGroup(rows, inputs, grid))
        return groups

    def _write_edit_prompts(
        self,
        texts: list[str],
        pictures: list[list[PIL.Image.Image]],
        masks: list[PIL.Image.Image] | None,
        grid: tuple[int, int] | None,
        upscale: int,
    ) -> list[PromptGroup]:
        """Prompts of editing, those whose codes have the same grid together: the source's, if `grid` is None."""
        image_processor = self.processor.image_processor
        side = 2 * image_processor.patch_size
        size = {} if grid is None else {"height": side * grid[0], "width": side * grid[1]}
        of_grid: dict[tuple[int, int], list[int]] = {}
        for row, (source, *_) in enumerate(pictures):
            row_grid = grid or image_processor.get_grid(source.height, source.width, "editing")
            of_grid.setdefault(row_grid, []).append(row)
        groups = []
        batches = [(of, batch) for of, rows in of_grid.items() for batch in _batches(rows, of)]
        for group_grid, rows in batches:
            with _sizes_at(upscale):
                inputs = self.processor(
                    images=[pictures[row] for row in rows], text=[texts[row] for row in rows], task="editing", **size
                )
            group = PromptGroup(rows, inputs, group_grid, num_pictures=[len(pictures[row]) for row in rows])
            if masks is not None:
                touched = [touched_codes(masks[row], image_processor).flatten() for row in rows]
                group.touched = torch.stack(touched)
            groups.append(group)
        return groups

    def _think(
        self, group: PromptGroup, generator: Generator, thinking_kwargs: dict[str, Any]
    ) -> tuple[list[str], BatchFeature]:
        """Lets the model write until it opens a picture; returns its thoughts, and prompts with them and a header."""
        inputs = group.inputs.to(self._execution_device)
        thinking_kwargs = {"max_new_tokens": DEFAULT_MAX_THINKING_TOKENS, **thinking_kwargs}
        limit = self.model.config.get_text_config().max_position_embeddings
        room = limit - inputs["input_ids"].shape[1] - HEADER_LENGTH - math.prod(group.grid)
        if room < 1:
            raise ValueError(
                f"`prompt` leaves no room to think: {inputs['input_ids'].shape[1]} tokens and {math.prod(group.grid)} "
                f"image codes of the model's {limit} positions; shorten it, or ask for a smaller picture."
            )
        thinking_kwargs["max_new_tokens"] = min(thinking_kwargs["max_new_tokens"], room)
        ends = thinking_kwargs.pop("eos_token_id", None) or self.model.generation_config.eos_token_id
        ends = [*(ends if isinstance(ends, (list, tuple)) else [ends]), self.model.config.begin_of_image_token_id]
        ids = self.model.generate(
            inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            eos_token_id=ends,
            generator=generator,
            show_progress_bar=self._shows_progress,
            **thinking_kwargs,
        )
        side = 2 * self.processor.image_processor.patch_size
        prompts = self.processor.add_image_header(
            ids, inputs["attention_mask"], height=side * group.grid[0], width=side * group.grid[1]
        )
        thoughts = []
        for row, mask, prompt_length in zip(
            prompts["input_ids"], prompts["attention_mask"], inputs["attention_mask"].sum(dim=-1).tolist(), strict=True
        ):
            thought = row[mask.bool()][prompt_length:-HEADER_LENGTH]
            thoughts.append(self.processor.post_process_image_text_to_text(thought[None])[0].strip())
        return thoughts, prompts

    def _generate_codes(
        self, group: PromptGroup, settings: CodeGenerationSettings, generator: Generator
    ) -> torch.LongTensor:
        """Codes `(rows, H, W)` of a group's pictures."""
        inputs = group.inputs.to(self._execution_device)
        known = {}
        if group.touched is not None:
            codes = self.model.get_image_codes(inputs["pixel_values"], inputs["image_grid_thw"])
            firsts = [sum(group.num_pictures[:row]) for row in range(len(group.rows))]
            known["image_codes"] = torch.stack([codes[first].flatten() for first in firsts])
            known["image_codes_mask"] = group.touched.to(known["image_codes"].device)
        inputs = {name: value for name, value in inputs.items() if name != "grid"}
        codes = self.model.generate_image_codes(
            **inputs,
            **known,
            grid=group.grid,
            guidance_scale=settings.guidance_scale,
            image_guidance_scale=settings.image_guidance_scale,
            guidance_rescale=settings.guidance_rescale,
            generator=generator,
            show_progress_bar=self._shows_progress,
            **{"num_steps_per_block": settings.num_steps_per_block, **settings.generation_kwargs},
        )
        return codes.view(-1, *group.grid)

    @property
    def _shows_progress(self) -> bool:
        return not getattr(self, "_progress_bar_config", {}).get("disable", False)

    def _bring_in_model(self) -> None:
        """
        Puts the language model on the execution device under `enable_model_cpu_offload`: its hook waits for
        `forward`, but the model is entered by its `generate` methods.
        """
        hook = getattr(self.model, "_hf_hook", None)
        if isinstance(hook, CpuOffload):
            hook.pre_forward(self.model)

    def _let_go_of_model(self) -> None:
        """Frees what the language model keeps on a card that it has to leave for the decoder."""
        if isinstance(getattr(self.model, "_hf_hook", None), CpuOffload):
            self.model.release_cuda_graphs()

    @staticmethod
    def _of_rows(generator: Generator, rows: Sequence[int], images_per_row: int) -> Generator:
        """The generators of some rows: of the images that share a row's codes, the first one's."""
        return [generator[row * images_per_row] for row in rows] if isinstance(generator, list) else generator
