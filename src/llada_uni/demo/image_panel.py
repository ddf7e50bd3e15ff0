"""What Draw and Edit have in common: images that come about in a gallery, with a line that says how far they are."""

import time
from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from .image_work import ImageProgress, ImageRequest, make_images
from .messages import told_in_a_sentence
from .model_turns import ModelTurns


# One model: images take turns. Who waits sees his place in the queue.
TURNS: dict[str, Any] = {
    "concurrency_id": "images",
    "concurrency_limit": 1,
    "api_visibility": "private",
    "show_progress": "minimal",
}


def gallery(label: str) -> gr.Gallery:
    return gr.Gallery(
        label=label,
        columns=1,
        height="auto",
        object_fit="contain",
        format="png",
        type="pil",
        interactive=False,
        buttons=["download", "fullscreen"],
        elem_classes="images",
    )


def looked_at(gallery: gr.Gallery, starts: list[Any]) -> gr.State:
    """
    Which image of a gallery a visitor has chosen last, by its index; the first, where he has not.

    Args:
        gallery: Of images.
        starts: Events that fill it anew.
    """
    index = gr.State(0)
    quiet: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}

    def choose(event: gr.SelectData) -> int:
        return event.index

    gallery.select(choose, None, index, **quiet)
    gr.on(starts, lambda: 0, None, index, **quiet)
    return index


async def show_images(turns: ModelTurns, request: ImageRequest) -> AsyncIterator[tuple[Any, Any, Any]]:
    """
    Yields:
        What goes into the gallery, the status below it, and the field of the seed.
    """
    began = time.perf_counter()
    yield gr.skip(), "It begins ...", gr.skip()
    progress: ImageProgress
    with told_in_a_sentence():
        async for progress in turns.on_images(lambda pipe, report: make_images(pipe, request, report)):
            shown: Any = gr.skip()
            if progress.images is not None:
                count = len(progress.images)
                has_captions = progress.is_finished and count > 1
                captions = [f"seed {seed}" if has_captions else None for seed in request.seeds]
                shown = gr.Gallery(list(zip(progress.images, captions, strict=True)), columns=min(count, 2))
            if progress.is_finished:
                status = (
                    f"{'An image' if count == 1 else f'{count} images'} in {time.perf_counter() - began:.1f} s, seed "
                    f"{request.seed}. The same seed, prompt and settings give the same."
                )
            else:
                status = f"Codes: {progress.num_done} of {progress.num_codes} ..."
                if progress.num_done == progress.num_codes:
                    status = "All codes are there; they are decoded ..."
            yield shown, status, request.seed
