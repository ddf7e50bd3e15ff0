"""Chat: a conversation with images, answered block by block."""

from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import gradio as gr
import PIL.Image
from PIL import ImageOps

from .examples import Examples
from .messages import told_in_a_sentence
from .model_turns import ModelTurns


# Visitors whose answers share a batch; the others wait in Gradio's queue.
MAX_ANSWERS = 16
MAX_PIXELS = 4096 * 4096


def chat_tab(turns: ModelTurns, examples: Examples) -> None:
    limit = turns.max_positions
    with gr.Accordion("Settings", open=False, render=False) as accordion:
        tokens = gr.Slider(16, limit, min(512, limit), step=16, label="Most tokens of an answer", render=False)
        temperature = gr.Slider(0, 2, 0, step=0.1, label="Temperature", info="0 takes the surest words.", render=False)

    async def answer(
        message: dict[str, Any], history: list[dict[str, Any]], max_new_tokens: int, temperature: float
    ) -> AsyncIterator[str]:
        sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {}
        with told_in_a_sentence():
            messages = read_history([*history, {"role": "user", "content": message}])
            async for text in turns.answer(messages, max_new_tokens, **sampling):
                yield text

    gr.ChatInterface(
        answer,
        multimodal=True,
        chatbot=gr.Chatbot(
            height=440,
            show_label=False,
            layout="bubble",
            buttons=["copy"],
            placeholder="Ask about an image, or anything.",
        ),
        textbox=gr.MultimodalTextbox(
            file_types=["image"],
            file_count="multiple",
            sources=["upload"],
            placeholder="Ask; images by the clip, or dropped here",
        ),
        additional_inputs=[tokens, temperature],
        additional_inputs_accordion=accordion,
        examples=[[{"text": text, "files": [str(path) for path in paths]}] for text, paths in examples.questions],
        cache_examples=False,
        flagging_mode="never",
        analytics_enabled=False,
        concurrency_limit=MAX_ANSWERS,
        api_visibility="private",
        fill_height=False,
    )


def read_history(history: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """
    Gradio's messages as the processor takes them. What one side says in several messages, files and words, is one
    turn, its images before its words.

    Raises:
        ValueError: for a file that is no image, and a turn without words.
    """
    turns: list[tuple[str, list[PIL.Image.Image], list[str]]] = []
    for message in history:
        if not turns or turns[-1][0] != message["role"]:
            turns.append((message["role"], [], []))
        _, images, words = turns[-1]
        for part in _parts(message["content"]):
            if isinstance(part, Path):
                images.append(open_upload(part))
            elif part.strip():
                words.append(part)
    messages: list[dict[str, Any]] = []
    for role, images, words in turns:
        if not words:
            raise ValueError("Write something beside the image, such as a question about it.")
        content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
        messages.append({"role": role, "content": [*content, {"type": "text", "text": "\n".join(words)}]})
    return messages


def _parts(content: Any) -> list[str | Path]:
    if isinstance(content, str):
        return [content]
    if isinstance(content, dict) and "files" in content:  # what has just been sent
        return [*(Path(_path(file)) for file in content["files"]), content.get("text") or ""]
    if isinstance(content, (list, tuple)):
        return [part for entry in content for part in _parts(entry)]
    return [content["text"]] if content.get("type") == "text" else [Path(_path(content.get("file", content)))]


def _path(file: Any) -> str:
    return file if isinstance(file, str) else file["path"]


def open_upload(path: Path) -> PIL.Image.Image:
    """
    An image that was sent, turned upright as its camera says.

    Raises:
        ValueError: if it is none, or too large. It names the file, and not where it lies here.
    """
    try:
        with PIL.Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"it has more than {MAX_PIXELS} pixels")
            return ImageOps.exif_transpose(image)
    except Exception as error:  # PIL raises whatever its decoders raise
        reason = str(error) if isinstance(error, ValueError) else "it is damaged, or something else"
        raise ValueError(f"{path.name} is no image that can be read: {reason}.") from error
