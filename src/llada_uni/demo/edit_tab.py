"""Edit: an image and what to change; with a brush, only a part of it is made anew."""

from collections.abc import AsyncIterator, Callable
from typing import Any

import gradio as gr
import PIL.Image
from PIL import ImageChops

from .chat_tab import MAX_PIXELS
from .draw_tab import DrawTab
from .examples import Examples
from .image_panel import TURNS, gallery, looked_at, show_images
from .image_work import ImageRequest
from .messages import told_in_a_sentence
from .model_turns import ModelTurns
from .settings import MAX_SIDE, SeedInputs, image_settings, settle_seed
from .stopping import stop_by


# Pixels of the shorter side below which an image is enlarged to be painted on: an emoji has 64. The longer side stays
# within `MAX_SIDE`: a strip of a few pixels would become one of gigabytes.
SIDE_TO_PAINT = 512
Drawn = list[tuple[PIL.Image.Image, str | None]] | None


def telling(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The editor's `preprocess`, which says of an image that it cannot read what is wrong with it."""

    def preprocess(payload: Any) -> Any:
        with told_in_a_sentence():
            try:
                return read(payload)
            except PIL.Image.DecompressionBombError as error:
                raise ValueError(f"The image has more than {MAX_PIXELS:,} pixels; make it smaller.") from error
            except Exception as error:  # PIL raises whatever its decoders raise
                raise ValueError("The image cannot be read: it is damaged, or something else.") from error

    return preprocess


def edit_tab(turns: ModelTurns, examples: Examples, drawn: DrawTab, tabs: gr.Tabs, tab_id: str) -> None:
    given = gr.State()  # the image that was enlarged to be painted on
    with gr.Row(equal_height=False, elem_classes="sides"):
        with gr.Column(scale=2, min_width=300):
            editor = gr.ImageEditor(
                label="Image",
                type="pil",
                format="png",
                sources=["upload", "clipboard"],
                transforms=(),
                layers=False,
                brush=gr.Brush(default_size=60, colors=["#7c3aed"], color_mode="fixed"),
                eraser=gr.Eraser(default_size=60),
                buttons=["fullscreen"],
                placeholder="# An image\nDrop it here, or click",
                height=380,
                elem_classes="editor",
            )
            # No class of its own: Gradio writes a file beside the module of a component.
            editor.preprocess = telling(editor.preprocess)  # type: ignore[method-assign,assignment]
            take = gr.Button("Take what was drawn last", size="sm")
            instruction = gr.Textbox(
                label="What to change",
                info="Paint over a part to make only that anew; then say what the whole image shows.",
                lines=2,
                max_lines=6,
                placeholder="make it winter",
            )
            with gr.Row():
                stop = gr.Button("Stop", min_width=80)
                edit = gr.Button("Edit", variant="primary", min_width=80)
            has_files = any(path is not None for path, _ in examples.edits)
            samples = gr.Dataset(
                components=[gr.Image(visible=False), instruction] if has_files else [instruction],
                headers=["Image", "What to change"] if has_files else None,
                samples=[[str(path), words] if has_files else [words] for path, words in examples.edits],
                label="Examples",
                type="index",
                elem_classes="later",
            )
            with gr.Accordion("Settings", open=False, elem_classes="later"):
                seed = SeedInputs.show()
                settings = image_settings(turns.pipe, is_edit=True)
        with gr.Column(scale=3, min_width=300, elem_classes="result"):
            images = gallery("Edited")
            status = gr.Markdown(elem_classes="status")
            again = gr.Button("Edit it further", size="sm")

    async def run(
        edited: dict[str, Any] | None,
        given: PIL.Image.Image | None,
        instruction: str,
        seed: float | None,
        is_random: bool,
        num_images: int,
        guidance: float,
        block_steps: int,
        steps: int,
    ) -> AsyncIterator[tuple[Any, Any, Any]]:
        with told_in_a_sentence():
            if not edited or edited["background"] is None:
                raise ValueError("There is no image to edit yet: upload one, or take what was drawn last.")
            if not instruction.strip():
                raise ValueError("Write what to change first.")
            image, mask = as_given(edited, given)
            request = ImageRequest(
                instruction,
                num_images,
                settle_seed(seed, is_random),
                image,
                mask,
                guidance_scale=guidance,
                num_steps_per_block=block_steps,
                num_inference_steps=steps,
            )
        async for shown in show_images(turns, request):
            yield shown

    def take_last(images: Drawn, index: int) -> tuple[Any, Any]:
        with told_in_a_sentence():
            if not images:
                raise ValueError("Nothing has been drawn yet.")
        image = images[index if index < len(images) else 0][0]
        return to_paint(image), image

    def choose(index: int) -> tuple[Any, ...] | str:
        path, words = examples.edits[index]
        if path is None:
            return words
        image = PIL.Image.open(path)
        return words, to_paint(image), image

    quiet: dict[str, Any] = {"queue": False, "api_visibility": "private"}
    inputs = [editor, given, instruction, *seed.components, *settings]
    outputs = [images, status, seed.seed]
    starts = [edit.click, instruction.submit]
    asked = gr.on(starts, run, inputs, outputs, show_progress_on=images, **TURNS)
    # Without files the editor is no output: Gradio would make it anew for this visitor, without what is told by it.
    chosen = samples.click(choose, samples, [instruction, *([editor, given] if has_files else [])], **quiet)
    events = [asked, chosen.then(run, inputs, outputs, show_progress_on=images, **TURNS)] if has_files else [asked]
    stop_by(stop, events, status)
    # Only errors of what goes through the queue are shown.
    queued: dict[str, Any] = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}
    of_drawn = [drawn.gallery, drawn.looked_at]
    take.click(take_last, of_drawn, [editor, given], **queued)
    again.click(
        take_last,
        [images, looked_at(images, [*starts, *([samples.click] if has_files else [])])],
        [editor, given],
        **queued,
    )
    drawn.edit_button.click(take_last, of_drawn, [editor, given], **queued).success(
        lambda: gr.Tabs(selected=tab_id), None, tabs, **quiet
    )


def to_paint(image: PIL.Image.Image) -> dict[str, Any]:
    """What the editor shows: the image, enlarged by a whole number if it is small, and nothing painted on it."""
    times = min(-(-SIDE_TO_PAINT // min(image.size)), MAX_SIDE // max(image.size))
    if times > 1:
        image = image.resize((times * image.width, times * image.height), PIL.Image.Resampling.BICUBIC)
    return {"background": image, "layers": [], "composite": image}


def as_given(edited: dict[str, Any], given: PIL.Image.Image | None) -> tuple[PIL.Image.Image, PIL.Image.Image | None]:
    """
    The image and what is painted of it (see [`painted`]): in the size that it had before it was enlarged, which says
    to some models what it shows.

    Args:
        edited: Of the editor.
        given: What it was given to show; by now a visitor may have put another one there.
    """
    image, mask = edited["background"], painted(edited)
    if given is None or given.size == image.size or not _are_equal(to_paint(given)["background"], image):
        return image, mask
    if mask is not None:
        mask = mask.resize(given.size, PIL.Image.Resampling.BOX).point(lambda value: 255 if value else 0)
    return given, mask


def _are_equal(one: PIL.Image.Image, other: PIL.Image.Image) -> bool:
    return one.size == other.size and one.convert("RGBA").tobytes() == other.convert("RGBA").tobytes()


def painted(edited: dict[str, Any]) -> PIL.Image.Image | None:
    """
    White where a visitor has painted; `None` if nowhere.

    Args:
        edited: Of the editor; in its layers everything is transparent but what is painted.
    """
    mask = PIL.Image.new("L", edited["background"].size)
    for layer in edited["layers"]:
        touched = layer.resize(mask.size).getchannel("A").point(lambda value: 255 if value else 0)
        mask = ImageChops.lighter(mask, touched)
    return mask if mask.getbbox() else None
