"""Draw: a prompt, and its images as their codes appear."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from .examples import Examples
from .image_panel import TURNS, gallery, looked_at, show_images
from .image_work import ImageRequest
from .messages import told_in_a_sentence
from .model_turns import ModelTurns
from .settings import MAX_SIDE, SeedInputs, image_settings, settle_seed
from .stopping import stop_by


@dataclass
class DrawTab:
    """What other tabs take from this one."""

    gallery: gr.Gallery
    looked_at: gr.State
    edit_button: gr.Button


def draw_tab(turns: ModelTurns, examples: Examples) -> DrawTab:
    with gr.Row(equal_height=False, elem_classes="sides"):
        with gr.Column(scale=2, min_width=300):
            prompt = gr.Textbox(label="What to draw", lines=2, max_lines=6, placeholder="a red apple", autofocus=True)
            with gr.Row():
                stop = gr.Button("Stop", min_width=80)
                draw = gr.Button("Draw", variant="primary", min_width=80)
            samples = gr.Dataset(
                components=[prompt],
                samples=[[text] for text in examples.drawings],
                label="Examples",
                elem_classes="later",
            )
            with gr.Accordion("Settings", open=False, elem_classes="later"):
                seed = SeedInputs.show()
                settings = image_settings(turns.pipe, is_edit=False)
                own = turns.pipe.code_generator.processor.default_side
                sides: dict[str, Any] = {"precision": 0, "minimum": 1, "maximum": MAX_SIDE, "min_width": 120}
                with gr.Row():
                    width = gr.Number(own, label="Width", info="In pixels.", **sides)
                    height = gr.Number(own, label="Height", info="In pixels.", **sides)
        with gr.Column(scale=3, min_width=300, elem_classes="result"):
            images = gallery("Drawn")
            status = gr.Markdown(elem_classes="status")
            edit = gr.Button("Edit it", size="sm")

    async def run(
        prompt: str,
        seed: float | None,
        is_random: bool,
        num_images: int,
        guidance: float,
        block_steps: int,
        steps: int,
        width: int,
        height: int,
    ) -> AsyncIterator[tuple[Any, Any, Any]]:
        with told_in_a_sentence():
            if not prompt.strip():
                raise ValueError("Write what to draw first.")
            request = ImageRequest(
                prompt,
                num_images,
                settle_seed(seed, is_random),
                width=width,
                height=height,
                guidance_scale=guidance,
                num_steps_per_block=block_steps,
                num_inference_steps=steps,
            )
        async for shown in show_images(turns, request):
            yield shown

    inputs = [prompt, *seed.components, *settings, width, height]
    outputs = [images, status, seed.seed]
    starts = [draw.click, prompt.submit]
    asked = gr.on(starts, run, inputs, outputs, show_progress_on=images, **TURNS)
    chosen = samples.click(lambda row: row[0], samples, prompt, queue=False, api_visibility="private")
    shown = chosen.then(run, inputs, outputs, show_progress_on=images, **TURNS)
    stop_by(stop, [asked, shown], status)
    return DrawTab(images, looked_at(images, [*starts, samples.click]), edit)
