"""Images for a visitor who watches: their codes block by block, with a preview now and then, then the images."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import PIL.Image
import torch
import torch.nn.functional as F

from diffusers_llada_uni import LLaDAUniPipeline
from diffusers_llada_uni.code_generation import (
    DEFAULT_GUIDANCE_SCALE,
    CodeGenerationSettings,
    CodeGenerator,
    PromptGroup,
    sequences_of,
)
from diffusers_llada_uni.image_inputs import images_per_prompt, masks_per_prompt
from diffusers_llada_uni.prompt_inputs import check_prompt
from transformers_llada_uni import BlockDiffusionGenerationConfig

from .code_preview import preview
from .model_turns import Report


# Between two parts there is a preview, which takes one step of the decoder: all of them less than half its work.
MAX_PARTS = 4


@dataclass(frozen=True)
class ImageRequest:
    """
    What a visitor wants. Fields are arguments of the pipeline's call, whose images are the same.

    Attributes:
        prompt: What to draw, or how to change `image`.
        num_images: Images of the prompt; the codes of several are sampled.
        seed: Of the first of them; each other has the next.
        image: To edit.
        mask: White where it is to be made anew.
    """

    prompt: str
    num_images: int = 1
    seed: int = 0
    image: PIL.Image.Image | None = None
    mask: PIL.Image.Image | None = None
    width: int | None = None
    height: int | None = None
    guidance_scale: float | None = None
    num_steps_per_block: int = 8
    num_inference_steps: int | None = None

    @property
    def seeds(self) -> list[int]:
        return [self.seed + index for index in range(self.num_images)]

    def generators(self) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in self.seeds]


@dataclass(frozen=True)
class ImageProgress:
    """
    Attributes:
        num_done, num_codes: Codes of an image, those that are finished and all.
        images: Previews; the images themselves once `is_finished`; `None` if they are as before.
    """

    num_done: int
    num_codes: int
    images: list[PIL.Image.Image] | None = None
    is_finished: bool = False


def make_images(pipe: LLaDAUniPipeline, request: ImageRequest, report: Report) -> None:
    """
    Makes what the pipeline's call would, and reports [`ImageProgress`] after every block.

    1. Check the arguments.
    2. Write the prompts.
    3. Generate the codes, block by block.
    4. Decode them.

    Raises:
        ValueError, TypeError: as the pipeline's call does.
    """
    # 1. Check the arguments.
    check_prompt(request.prompt)
    coder, decoder = pipe.code_generator, pipe.code_decoder
    decoding = decoder.settle(num_inference_steps=request.num_inference_steps)
    scale = request.guidance_scale
    if scale is None:
        scale = DEFAULT_GUIDANCE_SCALE if request.image is None else pipe.config["editing_guidance_scale"]
    sampling = {"do_sample": True} if request.num_images > 1 else {}
    settings = CodeGenerationSettings(
        scale, num_steps_per_block=request.num_steps_per_block, generation_kwargs=sampling
    )

    # 2. Write the prompts.
    texts = [request.prompt] * request.num_images
    if request.image is None:
        groups = coder.write_prompts(texts, coder.grid_of(request.height, request.width))
    else:
        image_processor, masks = coder.processor.image_processor, None
        sources = images_per_prompt(request.image, len(texts), True, image_processor)
        if request.mask is not None:
            masks = masks_per_prompt(request.mask, sources, image_processor)
        groups = coder.write_edit_prompts(texts, sources, masks)
    (group,) = groups  # the images of one prompt have one size, and a page shows few
    decoder.check_grid(group.grid, decoding)

    # 3. Generate the codes, block by block.
    generators, num_codes = request.generators(), math.prod(group.grid)
    codes = torch.empty(0)
    for codes, is_done in codes_by_parts(coder, group, settings, generators, report):
        num_done = int(is_done[0].sum())
        if num_done < num_codes:
            report(ImageProgress(num_done, num_codes, preview(decoder, codes, is_done, request.seeds)))

    # 4. Decode them.
    def on_step(*_: object) -> dict[str, object]:
        report(None)
        return {}

    images = decoder.decode(codes, decoding, generators, on_step_end=on_step)
    report(ImageProgress(num_codes, num_codes, list(images), is_finished=True))


def codes_by_parts(
    coder: CodeGenerator,
    group: PromptGroup,
    settings: CodeGenerationSettings,
    generators: list[torch.Generator],
    report: Report,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """
    The codes that `coder.generate` gives. It shows none before all are there; so they are made in several calls, of
    whole blocks each, in whose prompts stand the codes so far: a block sees nothing of those after it.

    Yields:
        Codes `(rows, H, W)`, and `(rows, H, W)`, true where they are finished. [`ImageProgress`] without images is
        reported after every block.
    """
    inputs = {name: value for name, value in group.inputs.to(coder.device).items() if name != "grid"}
    shape, num_codes = (len(group.rows), *group.grid), math.prod(group.grid)
    wanted = torch.ones(len(group.rows), num_codes, dtype=torch.bool, device=coder.device)
    codes = torch.zeros_like(wanted, dtype=torch.long)
    if group.touched is not None:
        known = coder.model.get_image_codes(inputs["pixel_values"], inputs["image_grid_thw"])
        codes = torch.stack([known[first].flatten() for first in group.first_images])
        wanted = group.touched.to(coder.device)
    start, offset = 0, coder.model.config.get_text_config().image_token_offset
    for stop in _ends_of_parts(coder, group):

        def on_block(done: int, total: int, start: int = start) -> None:
            report(ImageProgress(start + done, num_codes))

        if wanted[:, start:stop].any():
            call: dict[str, Any] = {
                **_with_codes(inputs, codes[:, :start] + offset),
                **settings.guidance,
                **settings.generation_kwargs,
            }
            made = coder.model.generate_image_codes(
                grid=(1, stop - start),
                image_codes=codes[:, start:stop],
                image_codes_mask=wanted[:, start:stop],
                num_steps_per_block=settings.num_steps_per_block,
                generator=generators,
                callback=on_block,
                **call,
            )
            codes[:, start:stop] = sequences_of(made)
        start = stop
        is_done = ~wanted
        is_done[:, :stop] = True
        yield codes.view(shape).clone(), is_done.view(shape)


def _with_codes(inputs: dict[str, torch.Tensor], ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same prompts, those that guidance leads away from among them, with ids `(rows, n)` behind them."""
    longer = dict(inputs)
    for kind in ("", "negative_", "negative_image_"):
        if f"{kind}input_ids" in inputs:
            longer[f"{kind}input_ids"] = torch.cat([inputs[f"{kind}input_ids"], ids], dim=1)
            longer[f"{kind}attention_mask"] = F.pad(inputs[f"{kind}attention_mask"], (0, ids.shape[1]), value=1)
    return longer


def _ends_of_parts(coder: CodeGenerator, group: PromptGroup) -> list[int]:
    """How many codes there are at the end of each part. Blocks are counted from the beginning of the prompt."""
    config, num_codes = coder.model.generation_config, math.prod(group.grid)
    assert isinstance(config, BlockDiffusionGenerationConfig)  # transformers says its own class
    length = config.block_length
    prompt = int(group.inputs["attention_mask"][0].sum())
    ends = [*range(length - prompt % length, num_codes, length), num_codes]
    return sorted({ends[max(len(ends) * part // MAX_PARTS, 1) - 1] for part in range(1, MAX_PARTS + 1)})
