"""Nodes that make image codes, of words and of images, and images of codes."""

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from .host import Progress
from .managed_pipeline import ManagedPipeline
from .node_inputs import (
    CATEGORY,
    CODES,
    MODEL,
    Codes,
    choice,
    flag,
    generators,
    integer,
    masks_to_pil,
    number,
    refusal_of_empty,
    seed,
    side,
    size_of,
    text,
    to_pil,
)


if TYPE_CHECKING:
    from diffusers_llada_uni.code_generation import CodeGenerationSettings, PromptGroup

GUIDANCE_RESCALE = number("Share of rescaled logits in guidance.", 0.7, 0.0, 1.0, 0.05)
STEPS_PER_BLOCK = integer("Steps the language model takes for a block of 32 codes.", 8, 1, 32)
NEGATIVE_PROMPT = text("What guidance leads away from. Best left empty: so the model was trained.")
DO_SAMPLE = flag("Draw the codes by chance, so that each seed gives another image; else the most probable ones.")
MAX_THINKING_TOKENS = 1024
EDITING = {
    "seed": seed("Of the codes, where they are sampled."),
    "do_sample": DO_SAMPLE,
    "guidance_scale": number("Guidance by the prompt; 1 is none. 0: what the model was made for.", 0.0, 0.0, 20.0),
    "image_guidance_scale": number("Guidance by the image.", 0.0, 0.0, 20.0),
    "guidance_rescale": GUIDANCE_RESCALE,
    "num_steps_per_block": STEPS_PER_BLOCK,
}


class _CodesOfWords:
    """The nodes that write prompts and let the language model generate the codes."""

    CATEGORY, FUNCTION = CATEGORY, "generate"

    @classmethod
    def VALIDATE_INPUTS(cls, prompt: str | None = None) -> bool | str:
        return refusal_of_empty("prompt", prompt)

    def _generate(
        self,
        model: ManagedPipeline,
        groups: "list[PromptGroup]",
        seed: int,
        settings: "CodeGenerationSettings",
        thinking: bool,
    ) -> tuple[Codes, list[str]]:
        sizes = [group.grid[0] * group.grid[1] for group in groups]
        thinking_tokens = MAX_THINKING_TOKENS if thinking else 0
        progress = Progress(sum(sizes) + thinking_tokens * len(groups))
        done = 0  # before the stretch of text or codes that is being made

        def on_text(tokens: int) -> None:
            progress.move_to(done + min(tokens, thinking_tokens))

        def on_codes(codes: int, all_codes: int) -> None:
            progress.move_to(done + codes)

        rows = max(len(group.rows) for group in groups)
        coder = model.writer(rows, max(sizes) + thinking_tokens, on_text, on_codes).code_generator
        generator = generators(seed, sum(len(group.rows) for group in groups))
        codes: dict[int, torch.Tensor] = {}
        thoughts: list[str] = []
        for group, size in zip(groups, sizes, strict=True):
            of_group = [generator[row] for row in group.rows]
            if thinking:
                thoughts += coder.think(group, {"max_new_tokens": MAX_THINKING_TOKENS}, of_group)
                done += thinking_tokens
            generated = coder.generate(group, settings, of_group)
            codes |= dict(zip(group.rows, generated.cpu(), strict=True))
            done += size
        return [codes[row] for row in sorted(codes)], thoughts


def code_settings(
    guidance_scale: float,
    guidance_rescale: float,
    num_steps_per_block: int,
    do_sample: bool,
    image_guidance_scale: float = 0.0,
) -> "CodeGenerationSettings":
    """
    Raises:
        ValueError, TypeError: naming what is out of its range.
    """
    from diffusers_llada_uni.code_generation import CodeGenerationSettings

    return CodeGenerationSettings(
        guidance_scale, image_guidance_scale, guidance_rescale, num_steps_per_block, {"do_sample": do_sample}
    )


class LLaDAUniDraw(_CodesOfWords):
    DESCRIPTION = "Draws what a prompt says: image codes, which Decode Codes makes an image of."
    RETURN_TYPES, RETURN_NAMES = (CODES, "STRING"), ("codes", "thoughts")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": (MODEL,),
                "prompt": text("What to draw.", "a red apple"),
                "width": side("Width"),
                "height": side("Height"),
                "seed": seed("Of the codes, where they are sampled. Decode Codes has a seed of its own."),
                "batch_size": integer("Images. Of several the codes are always sampled.", 1, 1, 64),
                "do_sample": DO_SAMPLE,
                "guidance_scale": number("Guidance by the prompt; 1 is none.", 2.0, 0.0, 20.0),
                "guidance_rescale": GUIDANCE_RESCALE,
                "num_steps_per_block": STEPS_PER_BLOCK,
            },
            "optional": {
                "negative_prompt": NEGATIVE_PROMPT,
                "thinking": flag("Let the model write its thoughts down first, at most 1,024 tokens."),
            },
        }

    def generate(
        self,
        model: ManagedPipeline,
        prompt: str,
        width: int,
        height: int,
        seed: int,
        batch_size: int,
        do_sample: bool,
        guidance_scale: float,
        guidance_rescale: float,
        num_steps_per_block: int,
        negative_prompt: str = "",
        thinking: bool = False,
    ) -> tuple[Codes, str]:
        from diffusers_llada_uni.prompt_inputs import check_negative_prompt, check_prompt

        settings = code_settings(guidance_scale, guidance_rescale, num_steps_per_block, do_sample or batch_size > 1)
        texts = check_prompt(prompt) * batch_size
        negatives = check_negative_prompt(negative_prompt, batch_size, guidance_scale)
        coder = model.pipe.code_generator
        grid = coder.grid_of(*size_of(height, width))
        # Thoughts tell how far they are in groups of one.
        batches = [[row] for row in range(batch_size)] if thinking else [list(range(batch_size))]
        groups = []
        for rows in batches:
            negative = None if negatives is None else [negatives[row] for row in rows]
            written = coder.write_prompts([texts[row] for row in rows], grid, thinking, negative_texts=negative)
            groups += [replace(group, rows=[rows[row] for row in group.rows]) for group in written]
        codes, thoughts = self._generate(model, groups, seed, settings, thinking)
        return codes, "\n\n".join(thoughts)


class LLaDAUniEdit(_CodesOfWords):
    DESCRIPTION = "Changes an image as an instruction says; each image of a batch by itself."
    RETURN_TYPES, RETURN_NAMES = (CODES,), ("codes",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": (MODEL,),
                "image": ("IMAGE", {"tooltip": "What to change."}),
                "prompt": text("How to change it."),
                **EDITING,
            },
            "optional": {
                "negative_prompt": NEGATIVE_PROMPT,
                "references": ("IMAGE", {"tooltip": "Images that the instruction speaks of, behind each source."}),
            },
        }

    def generate(
        self,
        model: ManagedPipeline,
        image: torch.Tensor,
        prompt: str,
        seed: int,
        do_sample: bool,
        guidance_scale: float,
        image_guidance_scale: float,
        guidance_rescale: float,
        num_steps_per_block: int,
        negative_prompt: str = "",
        references: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> tuple[Codes]:
        from diffusers_llada_uni.prompt_inputs import check_negative_prompt, check_prompt

        guidance_scale = guidance_scale or model.pipe.config["editing_guidance_scale"]
        settings = code_settings(
            guidance_scale, guidance_rescale, num_steps_per_block, do_sample, image_guidance_scale
        )
        sources = to_pil(image)
        texts = check_prompt(prompt) * len(sources)
        negatives = check_negative_prompt(negative_prompt, len(sources), guidance_scale)
        masks = None if mask is None else masks_to_pil(mask, sources)
        others = [] if references is None else to_pil(references)
        images = [[source, *others] for source in sources]
        groups = model.pipe.code_generator.write_edit_prompts(texts, images, masks, negative_texts=negatives)
        return (self._generate(model, groups, seed, settings, thinking=False)[0],)


class LLaDAUniFill(LLaDAUniEdit):
    DESCRIPTION = "Makes anew what a mask marks, as a prompt says; the codes around it stay."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": (MODEL,),
                "image": ("IMAGE",),
                "mask": ("MASK", {"tooltip": "What to make anew; one for each image, or one for all."}),
                "prompt": text("What to put there."),
                **EDITING,
            },
            "optional": {"negative_prompt": NEGATIVE_PROMPT},
        }


class LLaDAUniEncode:
    DESCRIPTION = "The codes of images, one for 16 x 16 pixels of what they are scaled and cropped to."
    CATEGORY, FUNCTION = CATEGORY, "encode"
    RETURN_TYPES, RETURN_NAMES = (CODES,), ("codes",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": (MODEL,),
                "image": ("IMAGE",),
                "resize_mode": choice(
                    "editing: cropped to the size that the decoder makes images of; understanding: more pixels, as "
                    "the model looks at images.",
                    "editing",
                    "understanding",
                ),
            }
        }

    @torch.no_grad()
    def encode(self, model: ManagedPipeline, image: torch.Tensor, resize_mode: str) -> tuple[Codes]:
        images = to_pil(image)
        # One after the other: of several images "understanding" makes smaller ones.
        processor = model.pipe.code_generator.processor.image_processor
        inputs = [processor(images=[each], resize_mode=resize_mode, return_tensors="pt") for each in images]
        progress = Progress(len(images))
        sizes = [int(of_image["image_grid_thw"].prod()) for of_image in inputs]
        coder = model.writer(1, max(sizes)).code_generator
        codes = []
        for of_image in inputs:
            of_image = of_image.to(coder.device)
            codes += coder.model.get_image_codes(of_image["pixel_values"], of_image["image_grid_thw"])
            progress.move_to(len(codes))
        return ([grid.cpu() for grid in codes],)


class LLaDAUniDecode:
    DESCRIPTION = "Makes images of codes. Images of several sizes come as a list, else as a batch."
    CATEGORY, FUNCTION = CATEGORY, "decode"
    RETURN_TYPES, RETURN_NAMES, OUTPUT_IS_LIST = ("IMAGE",), ("image",), (True,)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": (MODEL,),
                "codes": (CODES,),
                "seed": seed("Of the details that the codes leave open."),
                "decoder": choice(
                    "turbo takes few steps, normal many; auto: turbo, if it is loaded.", "auto", "turbo", "normal"
                ),
                "num_inference_steps": integer("0: 8 for turbo, 50 for normal.", 0, 0, 200),
                "decoder_guidance_scale": number(
                    "Of the normal decoder: 0 is none, and twice as fast.", 1.0, 0.0, 10.0
                ),
                "upscale": integer(
                    "A code becomes 16 times this many pixels down and across. The decoder learnt 2.", 2, 1, 4
                ),
            }
        }

    def decode(
        self,
        model: ManagedPipeline,
        codes: Codes,
        seed: int,
        decoder: str,
        num_inference_steps: int,
        decoder_guidance_scale: float,
        upscale: int,
    ) -> tuple[list[torch.Tensor]]:
        if not codes:
            raise ValueError("`codes` holds no image: the model has drawn none.")
        name = next(iter(model.pipe.loaded_decoders), None) if decoder == "auto" else decoder
        of_size: dict[tuple[int, ...], list[int]] = {}
        for index, grid in enumerate(codes):
            of_size.setdefault(tuple(grid.shape), []).append(index)
        settings: dict[str, Any] = {
            "decoder": name,
            "num_inference_steps": num_inference_steps or None,
            "decoder_guidance_scale": decoder_guidance_scale if name == "normal" else None,
            "upscale": upscale,
        }
        code_decoder = model.pipe.code_decoder  # checks, before anything is brought to the card
        checked = code_decoder.settle(*settings.values())
        for size in of_size:
            code_decoder.check_grid(size, checked)
        progress = Progress(len(of_size) * len(checked.sigmas))
        side = model.pipe.code_generator.pixels_per_code(upscale)
        num_codes = max(math.prod(size) * len(indices) for size, indices in of_size.items())
        pipe = model.decoder(checked.decoder, num_codes * side**2)
        generator, done = generators(seed, len(codes)), 0

        def on_step_end(*step: Any) -> None:
            nonlocal done
            done += 1
            progress.move_to(done)

        images: list[Any] = [None] * len(codes)
        for indices in of_size.values():
            decoded = pipe.decode_codes(
                torch.stack([codes[index] for index in indices]),
                **settings,
                generator=[generator[index] for index in indices],
                output_type="pt",
                callback_on_step_end=on_step_end,
            )
            assert isinstance(decoded, torch.Tensor)
            batch = decoded.movedim(1, -1).float().cpu().contiguous()
            if len(of_size) == 1:
                return ([batch],)
            for index, image in zip(indices, batch, strict=True):
                images[index] = image[None]
        return (images,)
