"""Story: text and images in turn, each as soon as it is finished."""

import asyncio
import base64
import html
import io
from collections.abc import AsyncIterator
from typing import Any

import gradio as gr
import PIL.Image

from .examples import Examples
from .messages import told_in_a_sentence
from .model_turns import ModelTurns
from .settings import MAX_IMAGES, MAX_SIDE, SeedInputs, settle_seed
from .stopping import stop_by


# Stories that are under work; the engine tells them one after the other.
TURNS: dict[str, Any] = {
    "concurrency_id": "stories",
    "concurrency_limit": 4,
    "api_visibility": "private",
    "show_progress": "minimal",
}


def story_tab(turns: ModelTurns, examples: Examples) -> None:
    with gr.Row(equal_height=False, elem_classes="sides"):
        with gr.Column(scale=2, min_width=300):
            prompt = gr.Textbox(label="What to tell", lines=2, max_lines=6, placeholder=examples.stories[0])
            with gr.Row():
                stop = gr.Button("Stop", min_width=80)
                tell = gr.Button("Tell", variant="primary", min_width=80)
            samples = gr.Dataset(
                components=[prompt],
                samples=[[text] for text in examples.stories],
                label="Examples",
                elem_classes="later",
            )
            with gr.Accordion("Settings", open=False, elem_classes="later"):
                seed = SeedInputs.show()
                most = gr.Slider(1, 2 * MAX_IMAGES, MAX_IMAGES, step=1, label="Images at most")
        with gr.Column(scale=3, min_width=300, elem_classes="result"):
            page = gr.HTML(label="Story", elem_classes="story", container=True, min_height=160)
            status = gr.Markdown(elem_classes="status")

    async def run(
        prompt: str, seed: float | None, is_random: bool, max_images: int
    ) -> AsyncIterator[tuple[Any, Any, Any]]:
        with told_in_a_sentence():
            if not prompt.strip():
                raise ValueError("Write what to tell first.")
            number = settle_seed(seed, is_random)
            yield "", "The first image comes with the text before it ...", number
            blocks: list[str] = []
            async for part in turns.tell(prompt, max_images, MAX_SIDE, number):
                blocks.append(await asyncio.to_thread(block_of, part))
                yield "".join(blocks), "It goes on ...", number
            yield gr.skip(), f"The end. Seed {number}; the same seed and prompt tell the same.", number

    inputs, outputs = [prompt, *seed.components, most], [page, status, seed.seed]
    asked = gr.on([tell.click, prompt.submit], run, inputs, outputs, show_progress_on=page, **TURNS)
    chosen = samples.click(lambda row: row[0], samples, prompt, queue=False, api_visibility="private")
    told = chosen.then(run, inputs, outputs, show_progress_on=page, **TURNS)
    stop_by(stop, [asked, told], status)


def block_of(part: str | PIL.Image.Image) -> str:
    """A part as HTML; the model's words are words."""
    if isinstance(part, str):
        return f"<p>{html.escape(part.strip()).replace(chr(10), '<br>')}</p>"
    file = io.BytesIO()
    part.save(file, "webp", lossless=max(part.size) <= 256, quality=90)
    return f'<img alt="" src="data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}">'
