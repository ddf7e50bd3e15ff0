"""`ask` and `chat`: messages with images."""

import os
import shlex
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import PIL.Image

from ..answers import ChatModel, stream_answer
from ..image_files import open_image


HELP = """\
/image PATH  adds an image to what you say next; a file dropped into the terminal does, too
/new         begins a new conversation
/help        shows this
/quit        ends, as does the end of input; Ctrl-C stops an answer"""


def message(role: str, text: str, images: list[PIL.Image.Image] | None = None) -> dict[str, Any]:
    """A message of a conversation, its images before its words."""
    if not images:
        return {"role": role, "content": text}
    parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    return {"role": role, "content": [*parts, {"type": "text", "text": text}]}


def paths_of(text: str) -> list[str]:
    """
    The paths that a line names, as they are typed or dropped into a terminal: with spaces, in quotes, with
    backslashes, with `~`, as `file://`; several where each is a file. What is no file stays as it is.
    """
    text = text.strip()
    whole = _path_of(text)
    if os.path.exists(whole):
        return [whole]
    try:
        words = shlex.split(text)
    except ValueError:  # a quote that has no end
        return [whole]
    paths = [_path_of(word) for word in words]
    return paths if len(paths) == 1 or (paths and all(map(os.path.exists, paths))) else [whole]


def _path_of(word: str) -> str:
    if word.lower().startswith("file:"):
        return url2pathname(urlsplit(word).path)
    return os.path.expanduser(word)


def _is_dropped(line: str) -> bool:
    """Whether a line is nothing but files, named from the root."""
    return all(os.path.isabs(path) and os.path.isfile(path) for path in paths_of(line))


def converse(
    chat_model: ChatModel,
    lines: Iterable[str],
    write: Callable[[str], None],
    max_new_tokens: int = 1024,
    **settings: Any,
) -> None:
    """
    A conversation, line by line, each answer written piece by piece.

    Args:
        chat_model: What answers.
        lines: What the user says; see `HELP`.
        write: Takes text.
        max_new_tokens: Of an answer.
        **settings: Of generation.
    """
    messages: list[dict[str, Any]] = []
    images: list[PIL.Image.Image] = []
    for line in map(str.strip, lines):
        command, _, rest = line.partition(" ")
        if not command:
            continue
        if command in ("/quit", "/exit"):
            return
        if command == "/new":
            messages, images = [], []
        elif command == "/image" or _is_dropped(line):
            try:
                images += [open_image(path) for path in paths_of(rest if command == "/image" else line)]
            except ValueError as error:
                write(f"{error}\n")
        elif command.startswith("/"):
            write(f"{HELP}\n")
        else:
            question, images, answer = message("user", line, images), [], ""
            try:
                for piece in stream_answer(chat_model, [*messages, question], max_new_tokens, **settings):
                    answer += piece
                    write(piece)
            except KeyboardInterrupt:  # ends the answer, not the conversation
                pass
            except ValueError as error:  # such as a conversation that has become too long
                write(f"{error}\n")
                continue
            write("\n")
            if answer:
                messages += [question, message("assistant", answer)]
