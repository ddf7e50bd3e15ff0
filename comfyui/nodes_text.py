"""Nodes that write: answers, and stories with images."""

from typing import Any

import torch

from .host import Progress
from .managed_pipeline import ManagedPipeline
from .node_inputs import (
    CATEGORY,
    CODES,
    MODEL,
    Codes,
    generators,
    integer,
    number,
    refusal_of_empty,
    seed,
    side,
    size_of,
    text,
    to_pil,
)
from .nodes_codes import GUIDANCE_RESCALE, STEPS_PER_BLOCK, code_settings


class LLaDAUniAsk:
    DESCRIPTION = "Answers a question about images, or without any."
    CATEGORY, FUNCTION = CATEGORY, "ask"
    RETURN_TYPES, RETURN_NAMES = ("STRING",), ("answer",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": (MODEL,),
                "question": text("What to ask.", "what is this?"),
                "max_new_tokens": integer(
                    "Of the answer, at most; fewer where the model's positions end.", 512, 1, 8192
                ),
                "temperature": number("0: the most probable words, whatever the seed.", 0.0, 0.0, 10.0),
                "seed": seed("Of the words, where they are sampled."),
            },
            "optional": {"image": ("IMAGE", {"tooltip": "All images of a batch belong to one question."})},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, question: str | None = None) -> bool | str:
        return refusal_of_empty("question", question)

    def ask(
        self,
        model: ManagedPipeline,
        question: str,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        image: torch.Tensor | None = None,
    ) -> tuple[str]:
        if not question.strip():
            raise ValueError("`question` must not be empty.")
        parts: list[dict[str, Any]] = [] if image is None else [{"type": "image", "image": i} for i in to_pil(image)]
        messages = [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]
        coder = model.pipe.code_generator
        prompt = coder.processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, add_generation_prompt=True
        )
        longest = coder.model.config.get_text_config().max_position_embeddings
        max_new_tokens = max(min(max_new_tokens, longest - len(prompt["input_ids"][0])), 1)
        progress = Progress(max_new_tokens)
        pipe = model.writer(1, max_new_tokens, progress.move_to)
        answer = pipe.chat(messages, max_new_tokens=max_new_tokens, **_sampling(temperature, seed))
        progress.move_to(max_new_tokens)  # most answers end early
        assert isinstance(answer, str)
        return (answer.strip(),)


class LLaDAUniStory:
    DESCRIPTION = (
        "Writes and draws in turn. `codes` are those of the images, for Decode Codes; `text` has [image 1] where the "
        "first one stands."
    )
    CATEGORY, FUNCTION = CATEGORY, "tell"
    RETURN_TYPES, RETURN_NAMES = (CODES, "STRING"), ("codes", "text")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": (MODEL,),
                "prompt": text("What to tell.", "a story of 4 moon phases from the new moon"),
                "max_images": integer("Images to draw at most.", 4, 1, 32),
                "width": side("Width of each image, 0 only with height 0."),
                "height": side("Height of each image, 0 only with width 0."),
                "max_new_tokens": integer("Of each stretch of text, at most.", 512, 1, 8192),
                "guidance_scale": number("Guidance of the images by the text; 1 is none.", 2.0, 0.0, 20.0),
                "image_guidance_scale": number("Guidance by the images before.", 0.0, 0.0, 20.0),
                "guidance_rescale": GUIDANCE_RESCALE,
                "num_steps_per_block": STEPS_PER_BLOCK,
                "temperature": number("Of words and codes; 0: the most probable, whatever the seed.", 0.0, 0.0, 10.0),
                "seed": seed("Of words and codes, where they are sampled."),
            },
            "optional": {"image": ("IMAGE", {"tooltip": "Images that stand before the prompt."})},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, prompt: str | None = None) -> bool | str:
        return refusal_of_empty("prompt", prompt)

    @torch.no_grad()
    def tell(
        self,
        model: ManagedPipeline,
        prompt: str,
        max_images: int,
        width: int,
        height: int,
        max_new_tokens: int,
        guidance_scale: float,
        image_guidance_scale: float,
        guidance_rescale: float,
        num_steps_per_block: int,
        temperature: float,
        seed: int,
        image: torch.Tensor | None = None,
    ) -> tuple[Codes, str]:
        from diffusers_llada_uni.prompt_inputs import check_prompt

        check_prompt(prompt)
        settings = code_settings(guidance_scale, guidance_rescale, num_steps_per_block, False, image_guidance_scale)
        guidance: dict[str, Any] = settings.guidance
        if bool(width) != bool(height):
            raise ValueError("`width` and `height` must both be given, or both be 0.")
        coder = model.pipe.code_generator
        default_grid = coder.grid_of(*size_of(height, width))
        inputs = coder.processor(images=None if image is None else to_pil(image), text=prompt, task="interleaved")

        # How long it becomes is not known: each image counts as much, its text as if it took all its tokens.
        num_codes = default_grid[0] * default_grid[1]
        of_image = max_new_tokens + num_codes
        progress = Progress(max_images * of_image)
        images_done = 0

        def on_text(tokens: int) -> None:
            progress.move_to(images_done * of_image + min(tokens, max_new_tokens))

        def on_codes(done: int, total: int) -> None:
            nonlocal images_done
            progress.move_to(images_done * of_image + max_new_tokens + num_codes * done // total)
            images_done += done == total

        coder = model.writer(1, max_images * of_image, on_text, on_codes).code_generator
        ids = coder.model.generate_interleaved(
            **inputs.to(coder.device),
            max_images=max_images,
            grid=default_grid if height else None,
            num_image_steps_per_block=num_steps_per_block,
            max_new_tokens=max_new_tokens,
            **guidance,
            **_sampling(temperature, seed),
        )
        parts = coder.processor.post_process(ids[:, inputs["input_ids"].shape[1] :])[0]
        progress.move_to(progress.total)  # it may have ended early
        codes: Codes = []
        words = []
        for part in parts:
            if isinstance(part, str):
                words.append(part.strip())
            else:
                codes.append(part.cpu())
                words.append(f"[image {len(codes)}]")
        return codes, "\n\n".join(word for word in words if word)


def _sampling(temperature: float, seed: int) -> dict[str, Any]:
    """Settings of `generate`, which refuses a temperature where nothing is sampled."""
    if not temperature:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature, "generator": generators(seed, 1)[0]}
