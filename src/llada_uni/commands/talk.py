"""`ask` and `chat`: messages with images."""

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .loading import load_to_talk
from .options import AsJson, Device, Dtype, Model, PromptsFile, Seed, Tokens, sampling
from .prompt_files import requests_of


if TYPE_CHECKING:
    import PIL.Image

    from ..answers import ChatModel

Temperature = Annotated[float, typer.Option(min=0, help="0 takes the surest words.")]

HELP = """\
/image PATH  adds an image to what you say next; a file dropped into the terminal does, too
/new         begins a new conversation
/help        shows this
/quit        ends, as does the end of input; Ctrl-C stops an answer"""


def ask(
    question: Annotated[str | None, typer.Argument(help="What to ask.")] = None,
    image: Annotated[
        list[str] | None, typer.Option("--image", "-i", help="An image it is about; more than once.")
    ] = None,
    prompts: PromptsFile = None,
    model: Model = "emoji",
    max_new_tokens: Tokens = 256,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Ask about images, or anything."""
    requests = requests_of("ask", question, prompts, image)
    chat_model = load_to_talk(model, device, dtype)
    from ..answers import stream_answer
    from ..image_files import open_image

    for request in requests:
        messages = [message("user", request.prompt, [open_image(path) for path in request.images])]
        answer_seed = seed if request.seed is None else request.seed
        pieces = stream_answer(chat_model, messages, max_new_tokens, answer_seed, **sampling(temperature))
        if as_json:
            entry = {"prompt": request.prompt, "image": list(request.images), "answer": "".join(pieces)}
            typer.echo(json.dumps(entry, ensure_ascii=False))
            continue
        for piece in pieces:
            typer.echo(piece, nl=False)
        typer.echo()


def chat(
    model: Model = "emoji",
    max_new_tokens: Tokens = 1024,
    temperature: Temperature = 0.0,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Talk with the model; images by /image PATH."""
    chat_model = load_to_talk(model, device, dtype)

    def typed() -> Iterator[str]:
        with suppress(EOFError):
            while True:
                yield input("> ")

    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with suppress(ImportError):
            import readline  # noqa: F401  keys that move in a line, and bring earlier ones back
        typer.echo(HELP)
    lines = typed() if is_terminal else sys.stdin
    further = {"is_typed": is_terminal, **sampling(temperature)}
    converse(chat_model, lines, lambda text: typer.echo(text, nl=False), max_new_tokens, **further)


def message(role: str, text: str, images: "list[PIL.Image.Image] | None" = None) -> dict[str, Any]:
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
        from urllib.parse import urlsplit
        from urllib.request import url2pathname

        return url2pathname(urlsplit(word).path)
    return os.path.expanduser(word)


def _is_dropped(line: str) -> bool:
    """Whether a line is nothing but files, named from the root."""
    return all(os.path.isabs(path) and os.path.isfile(path) for path in paths_of(line))


def converse(
    chat_model: "ChatModel",
    lines: Iterable[str],
    write: Callable[[str], None],
    max_new_tokens: int = 1024,
    is_typed: bool = True,
    **settings: Any,
) -> None:
    """
    A conversation, line by line, each answer written piece by piece.

    Args:
        chat_model: What answers.
        lines: What the user says; see `HELP`.
        write: Takes text.
        max_new_tokens: Of an answer.
        is_typed: Whether somebody sits there, who reads of a mistake and goes on.
        **settings: Of generation.

    Raises:
        ValueError: for a mistake, if nobody does.
    """
    from ..answers import stream_answer
    from ..image_files import open_image

    messages: list[dict[str, Any]] = []
    images: list[PIL.Image.Image] = []
    for line in lines:
        line = line.removeprefix("\ufeff").strip()  # of editors that mark UTF-8
        command, _, rest = line.partition(" ")
        if not command:
            continue
        if command in ("/quit", "/exit"):
            return
        if command == "/new":
            messages, images = [], []
        elif command == "/image" or _is_dropped(line):
            try:
                if not (paths := paths_of(rest if command == "/image" else line)) or not paths[0]:
                    raise ValueError("`/image` needs the path of an image behind it.")
                images += [open_image(path) for path in paths]
            except ValueError as error:
                if not is_typed:
                    raise
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
                if not is_typed:
                    raise
                write(f"{error}\n")
                continue
            write("\n")
            if answer:
                messages += [question, message("assistant", answer)]
