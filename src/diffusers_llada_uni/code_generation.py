"""Prompts and images -> image codes: the half of the pipeline that is the language model's."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import PIL.Image
import torch
from accelerate.hooks import CpuOffload
from transformers.image_processing_utils import BatchFeature

from transformers_llada_uni import (
    BlockDiffusionGenerationConfig,
    LLaDAUniForConditionalGeneration,
    LLaDAUniProcessor,
)
from transformers_llada_uni.generation.best_of import Reward, answer_log_probs, prompt_recall, rewards_of
from transformers_llada_uni.generation.block_diffusion import BlockDiffusionOutput
from transformers_llada_uni.generation.configuration import as_list
from transformers_llada_uni.generation.guidance_ramp import check_ramp
from transformers_llada_uni.generation.sampling import Generators
from transformers_llada_uni.image_places import HEADER_LENGTH
from transformers_llada_uni.image_sizes import UPSCALE
from transformers_llada_uni.input_checks import check_integer, check_number
from transformers_llada_uni.prompts import UNCONDITION

from .image_inputs import touched_codes


DEFAULT_MAX_THINKING_TOKENS = 1024
DEFAULT_GUIDANCE_SCALE = 2.0
# Codes that are generated at once, those of 64 images of 1024 x 1024. By then each expert gets so many tokens that a
# larger batch is hardly faster, and keys and values take 5 GB: 41 kB of bfloat16 for each code and branch of guidance.
MAX_CODES = 65_536


@dataclass
class CodeGenerationSettings:
    """
    How the language model generates image codes; fields as in the pipeline's call.

    Raises:
        ValueError, TypeError: for a value out of its range, by its name.
    """

    guidance_scale: float = DEFAULT_GUIDANCE_SCALE
    image_guidance_scale: float = 0.0
    guidance_rescale: float = 0.7
    num_steps_per_block: int = 8
    generation_kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_number("guidance_scale", self.guidance_scale, 0.0)
        check_number("image_guidance_scale", self.image_guidance_scale, 0.0)
        check_number("guidance_rescale", self.guidance_rescale, 0.0, 1.0)
        check_integer("num_steps_per_block", self.num_steps_per_block, minimum=1)
        check_generation_kwargs("generation_kwargs", self.generation_kwargs)
        settings = {**self.guidance, **self.generation_kwargs}
        check_ramp(settings, settings["guidance_scale"] != 1 or settings["image_guidance_scale"] != 0)

    @property
    def guidance(self) -> dict[str, float]:
        """The three scales, as the model's methods take them; those of `generation_kwargs` count."""
        names = ("guidance_scale", "image_guidance_scale", "guidance_rescale")
        return {name: self.generation_kwargs.get(name, getattr(self, name)) for name in names}


@dataclass
class PromptGroup:
    """Prompts for images of one grid, which the language model takes as one batch: at most [`MAX_CODES`]."""

    rows: list[int]
    inputs: BatchFeature
    grid: tuple[int, int]
    touched: torch.Tensor | None = None  # (rows, H * W), true for the codes to make anew
    first_images: list[int] = field(default_factory=list)  # of each row, the place of its first among all images
    source_codes: torch.Tensor | None = None  # (rows, H * W), of sources that were given as codes, with `touched`


class CodeGenerator:
    r"""
    Makes image codes of prompts. [`LLaDAUniPipeline`] uses it; it can stand elsewhere than what decodes the codes.

        coder = CodeGenerator(pipe.model, pipe.processor)
        (group,) = coder.write_prompts(["a red apple"], coder.grid_of(1024, 1024))
        codes = coder.generate(group, CodeGenerationSettings())  # (1, 32, 32)

    Args:
        model ([`LLaDAUniForConditionalGeneration`]): The language model.
        processor ([`LLaDAUniProcessor`]): Words and images to its inputs.
        device (`torch.device`, *optional*): Where the inputs are put; that of the model by default.
    """

    def __init__(
        self,
        model: LLaDAUniForConditionalGeneration,
        processor: LLaDAUniProcessor,
        device: torch.device | None = None,
    ) -> None:
        self.model, self.processor = model, processor
        self.device = model.device if device is None else device

    # 1. Prompts

    def pixels_per_code(self, upscale: int = UPSCALE) -> int:
        """Side in pixels of what becomes of a code."""
        return self.processor.image_processor.pixels_per_code * upscale // UPSCALE

    def grid_of(self, height: int | None, width: int | None, upscale: int = UPSCALE) -> tuple[int, int]:
        """The grid (H, W) of codes of an image of so many pixels, the checkpoint's own size where they are `None`."""
        side = self.pixels_per_code(upscale)
        default = max(self.processor.default_side // side, 1) * side  # the largest that there is at this `upscale`
        rows = _check_side("height", default if height is None else height, multiple=side) // side
        columns = _check_side("width", default if width is None else width, multiple=side) // side
        return rows, columns

    def write_prompts(
        self,
        texts: list[str],
        grid: tuple[int, int],
        thinking: bool = False,
        upscale: int = UPSCALE,
        negative_texts: list[str] | None = None,
    ) -> list[PromptGroup]:
        """
        Prompts of text-to-image; with thinking they end where the thoughts begin.

        Args:
            texts: What to draw.
            grid: Height and width of all images, in codes.
            thinking: Whether the model is to [`think`] first.
            upscale: That of the decoder, for messages about sizes.
            negative_texts: For each what guidance leads away from; the empty string for the model's own "no text".
        """
        groups = []
        task = "thinking" if thinking else "text_to_image"
        for rows in _batches(list(range(len(texts))), grid):
            with _sizes_at(upscale):
                inputs = self.processor(text=[texts[row] for row in rows], task=task, **self._size(grid))
            group = PromptGroup(rows, inputs, grid)
            if negative_texts is not None:
                # With thinking, `think` makes what guidance needs of a prompt whose thoughts are known.
                arguments: dict[str, Any] = {"task": task, "thinking_text": [""] * len(rows) if thinking else None}
                self._set_negative(group, [negative_texts[row] for row in rows], **arguments, **self._size(grid))
            groups.append(group)
        return groups

    def write_edit_prompts(
        self,
        texts: list[str],
        images: list[list[PIL.Image.Image]] | list[list[torch.Tensor]],
        masks: list[PIL.Image.Image] | None = None,
        grid: tuple[int, int] | None = None,
        upscale: int = UPSCALE,
        negative_texts: list[str] | None = None,
    ) -> list[PromptGroup]:
        """
        Prompts of editing, those whose codes have the same grid together: the source's, if `grid` is `None`.

        Args:
            texts, grid, upscale, negative_texts: As in [`write_prompts`].
            images: For each text its source, and references; or codes `(H, W)` of these.
            masks: For each text a mask of its source, white where it is to be made anew; of codes with a pixel each.
        """
        are_codes = isinstance(images[0][0], torch.Tensor)
        image_processor = self.processor.image_processor
        size: dict[str, Any] = {} if grid is None else self._size(grid)
        of_grid: dict[tuple[int, int], list[int]] = {}
        for row in range(len(images)):
            source = images[row][0]
            if isinstance(source, torch.Tensor):
                own = (source.shape[0], source.shape[1])
            else:
                own = image_processor.get_grid(source.height, source.width, "editing")
            of_grid.setdefault(grid or own, []).append(row)
        groups = []
        batches = [(of, batch) for of, rows in of_grid.items() for batch in _batches(rows, of)]
        for group_grid, rows in batches:
            name = "image_codes" if are_codes else "images"
            arguments: dict[str, Any] = {name: [images[row] for row in rows], "task": "editing", **size}
            with _sizes_at(upscale):
                inputs = self.processor(text=[texts[row] for row in rows], **arguments)
            group = PromptGroup(rows, inputs, group_grid)
            group.first_images = [sum(len(images[other]) for other in rows[:index]) for index in range(len(rows))]
            if masks is not None:
                touched = [touched_codes(masks[row], image_processor, are_codes).flatten() for row in rows]
                if not all(codes.any() for codes in touched):
                    raise ValueError(
                        "`mask_image`: what is white of it is cut off, with the edges of its image, which has not the "
                        "shape that the model works in."
                    )
                group.touched = torch.stack(touched)
                if are_codes:
                    group.source_codes = torch.stack([torch.as_tensor(images[row][0]).flatten() for row in rows])
            if negative_texts is not None:
                self._set_negative(group, [negative_texts[row] for row in rows], **arguments)
            groups.append(group)
        return groups

    def _set_negative(self, group: PromptGroup, negative_texts: list[str], **arguments: Any) -> None:
        """Puts the prompts of other words in the place of those without words, which guidance leads away from."""
        if any(negative_texts):
            negative = self.processor(text=[text or UNCONDITION for text in negative_texts], **arguments)
            for name in ("input_ids", "attention_mask"):
                group.inputs[f"negative_{name}"] = negative[name]

    def _size(self, grid: tuple[int, int]) -> dict[str, Any]:
        """The processor speaks of pixels as the decoder draws them at [`UPSCALE`]."""
        side = self.pixels_per_code()
        return {"height": side * grid[0], "width": side * grid[1]}

    # 2. Thoughts

    def think(
        self,
        group: PromptGroup,
        thinking_kwargs: dict[str, Any] | None = None,
        generator: Generators = None,
        show_progress_bar: bool = False,
    ) -> list[str]:
        """
        Lets the model write until it opens an image; puts its thoughts, and a header, behind the group's prompts.

        Args:
            group: Of [`write_prompts`] with `thinking=True`.
            thinking_kwargs: Fields of [`BlockDiffusionGenerationConfig`]; `max_new_tokens` is 1024 by default.

        Returns:
            The thoughts, one for each prompt.

        Raises:
            ValueError: if the prompt and the image leave no room.
        """
        inputs = group.inputs.to(self.device)
        settings = {"max_new_tokens": DEFAULT_MAX_THINKING_TOKENS, **(thinking_kwargs or {})}
        limit = self.model.config.get_text_config().max_position_embeddings
        room = limit - inputs["input_ids"].shape[1] - HEADER_LENGTH - math.prod(group.grid)
        if room < 1:
            raise ValueError(
                f"`prompt` leaves no room to think: {inputs['input_ids'].shape[1]} tokens and {math.prod(group.grid)} "
                f"image codes of the model's {limit} positions; shorten it, or ask for a smaller image."
            )
        settings["max_new_tokens"] = min(settings["max_new_tokens"], room)
        ends = settings.pop("eos_token_id", None) or self.own_settings.eos_token_id
        ends = [*(ends if isinstance(ends, (list, tuple)) else [ends]), self.model.config.begin_of_image_token_id]
        ids = sequences_of(
            self.model.generate(
                inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                eos_token_id=ends,
                generator=generator,
                show_progress_bar=show_progress_bar,
                **({"tokenizer": self.processor.tokenizer} if "stop_strings" in settings else {}),
                **settings,
            )
        )
        prompts = self.processor.add_image_header(ids, inputs["attention_mask"], **self._size(group.grid))
        thoughts = []
        lengths = inputs["attention_mask"].sum(dim=-1).tolist()
        rows = zip(prompts["input_ids"], prompts["attention_mask"], lengths, strict=True)
        for row, mask, prompt_length in rows:
            thought = row[mask.bool()][prompt_length:-HEADER_LENGTH]
            thoughts.append(self.processor.post_process_image_text_to_text(thought[None])[0].strip())
        negative = {name: value for name, value in inputs.items() if name.startswith("negative_")}
        group.inputs = BatchFeature({**prompts, **negative})
        return thoughts

    # 3. Codes

    def generate(
        self,
        group: PromptGroup,
        settings: CodeGenerationSettings,
        generator: Generators = None,
        callback: Callable[[int, int], None] | None = None,
    ) -> torch.Tensor:
        """
        Args:
            group: Prompts, with thoughts if the model thinks.
            settings: How to generate.
            generator: One for all rows, or one for each.
            callback: Called after every block with the codes done and all, of a row.

        Returns:
            Codes `(rows, H, W)` of the group's images.
        """
        inputs = group.inputs.to(self.device)
        known: dict[str, Any] = {}
        if group.touched is not None:
            source_codes = group.source_codes
            if source_codes is None:
                codes = self.model.get_image_codes(inputs["pixel_values"], inputs["image_grid_thw"])
                source_codes = torch.stack([codes[first].flatten() for first in group.first_images])
            known["image_codes"] = source_codes.to(inputs["input_ids"].device)
            known["image_codes_mask"] = group.touched.to(known["image_codes"].device)
        generated = sequences_of(
            self.model.generate_image_codes(
                **{name: value for name, value in inputs.items() if name != "grid"},
                **known,
                grid=group.grid,
                generator=generator,
                callback=callback,
                **{
                    **settings.guidance,
                    "num_steps_per_block": settings.num_steps_per_block,
                    **settings.generation_kwargs,
                },
            )
        )
        return generated.view(-1, *group.grid)

    # 4. Candidates

    def judge(self, prompts: list[str], image_codes: list[torch.Tensor], reward: Reward | None = None) -> list[float]:
        """
        Args:
            prompts: Of each candidate.
            image_codes: Codes `(H, W)` of each.
            reward: See the pipeline's call; the model itself by default.

        Returns:
            A number for each, the higher the better.

        Raises:
            ValueError: if the reward gives other than finite numbers.
        """
        if reward is None:
            return prompt_recall(self.model, self.processor, prompts, image_codes)
        offset = self.model.config.get_text_config().image_token_offset
        ids = [(codes.flatten() + offset).tolist() for codes in image_codes]
        columns = {"prompts": prompts, "image_codes": image_codes, "completion_ids": ids}
        return rewards_of(reward, len(prompts), completions=[""] * len(prompts), **columns)

    def judge_answers(
        self,
        messages: list[Any],
        prompts: list[torch.Tensor],
        answer_ids: torch.Tensor,
        answers: list[str],
        reward: Reward | None = None,
    ) -> list[float]:
        """
        As [`judge`], of answers.

        Args:
            messages: The conversation of each candidate.
            prompts: Its ids `(length,)`, images in it as their codes.
            answer_ids: Ids `(candidates, length)` of the answers, padded behind their ends.
            answers: The answers as texts.
        """
        config = self.own_settings
        ends = {config.pad_token_id, *as_list(config.eos_token_id)}
        rows = []
        for row in answer_ids:
            length = next((place for place, token in enumerate(row.tolist()) if token in ends), len(row))
            rows.append(row[: max(length, 1)])
        if reward is None:
            return answer_log_probs(self.model, prompts, rows)
        ids = [row.tolist() for row in rows]
        return rewards_of(reward, len(rows), prompts=messages, completions=answers, completion_ids=ids)

    @property
    def own_settings(self) -> BlockDiffusionGenerationConfig:
        """What holds for the model's `generate` where a call says nothing."""
        return self.model.settle_generation_config(None, {})

    # A pipeline's model may wait on another device.

    def bring_in_model(self) -> None:
        """
        Puts the language model on the execution device under `enable_model_cpu_offload`: its hook waits for
        `forward`, but the model is entered by its `generate` methods.
        """
        hook = getattr(self.model, "_hf_hook", None)
        if isinstance(hook, CpuOffload):
            hook.pre_forward(self.model)

    def let_go_of_model(self) -> None:
        """Frees what the language model keeps on a card that it has to leave for the decoder."""
        if isinstance(getattr(self.model, "_hf_hook", None), CpuOffload):
            self.model.release_cuda_graphs()


def sequences_of(generated: torch.Tensor | BlockDiffusionOutput) -> torch.Tensor:
    """What a `generate` method returns, whether or not with counts."""
    return generated["sequences"] if isinstance(generated, BlockDiffusionOutput) else generated


def check_generation_kwargs(name: str, settings: Any) -> None:
    """A dict of fields of [`BlockDiffusionGenerationConfig`], which refuses unknown names and values itself."""
    if not isinstance(settings, dict):
        raise TypeError(f"`{name}` must be a dict, got {type(settings).__name__}.")
    try:
        # Whether settings of sampling are of use, `generate` says, which knows the model's own.
        BlockDiffusionGenerationConfig(**{"do_sample": not settings.get("self_speculation"), **settings})
    except (TypeError, ValueError) as error:
        raise type(error)(f"`{name}`: {error}") from error


def _check_side(name: str, value: Any, multiple: int) -> int:
    """A side of the image, in pixels."""
    check_integer(name, value, minimum=1)
    if value % multiple:
        nearest = max(1, math.floor(value / multiple + 0.5)) * multiple
        raise ValueError(f"`{name}` must be a multiple of {multiple}, got {value}; the nearest is {nearest}.")
    return value


@contextmanager
def _sizes_at(upscale: int) -> Iterator[None]:
    """Errors of the processor name sizes at [`UPSCALE`]; at another they must say so."""
    try:
        yield
    except ValueError as error:
        if upscale == UPSCALE:
            raise
        raise ValueError(
            f"{error} (Sizes in this message are at `upscale` {UPSCALE}; at {upscale} they are {upscale / UPSCALE:g} "
            "times as large.)"
        ) from error


def _batches(rows: list[int], grid: tuple[int, int]) -> list[list[int]]:
    """The rows in their order, those that are generated at once together."""
    size = max(1, MAX_CODES // math.prod(grid))
    return [rows[first : first + size] for first in range(0, len(rows), size)]
