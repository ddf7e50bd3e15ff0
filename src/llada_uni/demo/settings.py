"""The settings that tabs share: folded away, with the pipeline's own defaults."""

import random
from dataclasses import dataclass
from typing import Any

import gradio as gr

from diffusers_llada_uni import LLaDAUniPipeline
from diffusers_llada_uni.code_generation import DEFAULT_GUIDANCE_SCALE


MAX_SEED = 2**53 - 1  # beyond it JavaScript keeps no number as it is
MAX_NEW_SEED = 999_999  # short enough for a caption
MAX_IMAGES = 4
MAX_SIDE = 2048


@dataclass
class SeedInputs:
    """A seed that is new each time, or stays; it shows the one that was used, so that a result can be repeated."""

    seed: gr.Number
    is_random: gr.Checkbox

    @classmethod
    def show(cls) -> "SeedInputs":
        with gr.Row():
            seed = gr.Number(0, label="Seed", minimum=0, maximum=MAX_SEED, precision=0, min_width=120)
            is_random = gr.Checkbox(True, label="New seed each time", min_width=120)
        return cls(seed, is_random)

    @property
    def components(self) -> list[Any]:
        return [self.seed, self.is_random]


def settle_seed(seed: float | None, is_random: bool) -> int:
    """
    Raises:
        ValueError: if the field of the seed is empty.
    """
    if is_random:
        return random.randint(0, MAX_NEW_SEED)
    if seed is None:
        raise ValueError("Give a seed, or let there be a new one each time.")
    return int(seed)


def image_settings(pipe: LLaDAUniPipeline, is_edit: bool) -> list[Any]:
    """Inputs for the number of images, guidance, steps of a block, and steps of the decoder."""
    guidance = pipe.config["editing_guidance_scale"] if is_edit else DEFAULT_GUIDANCE_SCALE
    steps = pipe.code_decoder.settle().num_inference_steps
    most = 16 if "turbo" in pipe.loaded_decoders else 100
    return [
        gr.Slider(
            1, MAX_IMAGES, 1, step=1, label="Images", info="One takes the surest codes; of several they differ."
        ),
        gr.Slider(0, 10, guidance, step=0.1, label="Guidance", info="How closely the prompt is followed; 1 is none."),
        gr.Slider(1, 32, 8, step=1, label="Steps of a block", info="In how many steps a block of codes is filled in."),
        gr.Slider(2, most, steps, step=1, label="Steps of the decoder", info="From the codes to the pixels."),
    ]
