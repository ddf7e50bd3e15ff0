"""`ask` and `chat`: messages with images."""

import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import PIL.Image

from ..answers import stream_answer
from .images import open_image


if TYPE_CHECKING:
    from diffusers_llada_uni import LLaDAUniPipeline

HELP = "/image PATH adds an image to what you say next; /new begins again; /quit, or the end of input, ends."


def message(role: str, text: str, images: list[PIL.Image.Image] | None = None) -> dict[str, Any]:
    """A message of a conversation, its images before its words."""
    if not images:
        return {"role": role, "content": text}
    parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    return {"role": role, "content": [*parts, {"type": "text", "text": text}]}


def converse(
    pipe: "LLaDAUniPipeline",
    lines: Iterable[str],
    write: Callable[[str], None],
    max_new_tokens: int = 1024,
    **settings: Any,
) -> None:
    """
    A conversation, line by line, each answer written piece by piece.

    Args:
        pipe: The pipeline.
        lines: What the user says; see `HELP`.
        write: Takes text.
        max_new_tokens: Of an answer.
        **settings: Of generation.
    """
    messages: list[dict[str, Any]] = []
    images: list[PIL.Image.Image] = []
    for line in lines:
        command, _, rest = line.strip().partition(" ")
        if not command:
            continue
        if command in ("/quit", "/exit"):
            return
        if command == "/new":
            messages, images = [], []
        elif command == "/image":
            try:
                images.append(open_image(os.path.expanduser(rest.strip())))
            except ValueError as error:
                write(f"{error}\n")
        elif command.startswith("/"):
            write(f"{HELP}\n")
        else:
            messages.append(message("user", line.strip(), images))
            images, answer = [], ""
            try:
                for piece in stream_answer(pipe, messages, max_new_tokens, **settings):
                    answer += piece
                    write(piece)
            except KeyboardInterrupt:  # ends the answer, not the conversation
                pass
            except ValueError as error:  # such as a conversation that has become too long
                messages.pop()
                write(f"{error}\n")
                continue
            write("\n")
            messages.append(message("assistant", answer))
