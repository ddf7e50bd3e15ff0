"""Chat: a conversation with images, answered block by block."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import contextmanager
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
MAX_IMAGES = 16  # of a conversation, all of which are in memory at once
NO_ANSWER = "*(no answer)*"  # what is shown of an answer without words


class Chat(gr.ChatInterface):
    """Gradio's, which goes on after an error: what was refused is in the box again, not in the conversation."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.answering: set[str | None] = set()  # sessions; Gradio takes an answer that is stopped for a failure
        super().__init__(*args, **kwargs)

    @contextmanager
    def goes_on(self, request: gr.Request) -> Iterator[None]:
        """Around the work for an answer; an error inside is told in a sentence."""
        self.answering.add(request.session_hash)
        try:
            with told_in_a_sentence():
                yield
        except gr.Error:
            self.answering.discard(request.session_hash)
            raise
        self.answering.discard(request.session_hash)

    def _put_back(self, message: Any, request: gr.Request) -> Any:
        """What was refused, wherever; what is stopped is in the conversation."""
        if request.session_hash in self.answering:
            self.answering.discard(request.session_hash)
            return gr.skip()
        submit = self.textbox.submit_btn
        return gr.MultimodalTextbox(message, interactive=True, submit_btn=submit, stop_btn=False)

    def _setup_stop_events(
        self, event_triggers: list[Callable[..., Any]], events_to_cancel: list[Any], after_success: Any
    ) -> None:
        # The one place where Gradio hands out its events. Of what follows them by `then`, an error lets nothing come.
        super()._setup_stop_events(event_triggers, events_to_cancel, after_success)
        for event in events_to_cancel:
            event.failure(self._put_back, self.saved_input, self.textbox, queue=False, api_visibility="private")


def chat_tab(turns: ModelTurns, examples: Examples) -> None:
    limit = turns.max_positions
    with gr.Accordion("Settings", open=False, render=False) as accordion:
        tokens = gr.Slider(16, limit, min(512, limit), step=16, label="Most tokens of an answer", render=False)
        temperature = gr.Slider(0, 2, 0, step=0.1, label="Temperature", info="0 takes the surest words.", render=False)

    async def answer(
        message: dict[str, Any],
        history: list[dict[str, Any]],
        max_new_tokens: int,
        temperature: float,
        request: gr.Request,
    ) -> AsyncIterator[str]:
        sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {}
        with chat.goes_on(request):
            # In a thread: large images take their time, and others' answers are streamed meanwhile.
            messages = await asyncio.to_thread(read_history, [*history, {"role": "user", "content": message}])
            text = ""
            async for text in turns.answer(messages, max_new_tokens, **sampling):
                yield text
            if not text.strip():
                yield NO_ANSWER

    chat = Chat(
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
            stop_btn=True,  # while an answer comes
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
        ValueError: for a file that is no image, a user's turn without words, and more than `MAX_IMAGES`.
    """
    turns: list[tuple[str, list[PIL.Image.Image], list[str]]] = []
    num_images = 0
    for message in history:
        if not turns or turns[-1][0] != message["role"]:
            turns.append((message["role"], [], []))
        _, images, words = turns[-1]
        for part in _parts(message["content"]):
            if isinstance(part, Path):
                num_images += 1
                if num_images > MAX_IMAGES:
                    raise ValueError(f"A conversation may have {MAX_IMAGES} images; begin a new one for others.")
                images.append(open_upload(part))
            elif part.strip() and (message["role"], part) != ("assistant", NO_ANSWER):
                words.append(part)
    messages: list[dict[str, Any]] = []
    for role, images, words in turns:
        if not words and role == "user":
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
    except FileNotFoundError as error:
        raise ValueError(f"{path.name} is not kept any longer. Begin a new conversation.") from error
    except Exception as error:  # PIL raises whatever its decoders raise
        reason = str(error) if isinstance(error, ValueError) else "it is damaged, or something else"
        raise ValueError(f"{path.name} is no image that can be read: {reason}.") from error
