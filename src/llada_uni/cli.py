"""
The command `llada-uni`: its commands put together, and how their mistakes are told. What they are is in
`llada_uni.commands`; torch is imported once one of them runs, so that `--help` comes at once.
"""

import errno
import gc
import io
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from .commands import evaluate
from .commands.checkpoints import assemble, consolidate, convert, merge
from .commands.codes import decode, encode
from .commands.demo import demo
from .commands.images import draw, edit, fill
from .commands.info import info
from .commands.serve import serve
from .commands.story import story
from .commands.talk import ask, chat
from .commands.train import STAGES, prepare


@contextmanager
def _interruptible() -> Iterator[None]:
    """An interruption is told in a line, with exit code 130."""
    try:
        yield
    except KeyboardInterrupt as error:
        typer.echo("llada-uni: interrupted", err=True)
        raise typer.Exit(130) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _sentence(error: OSError) -> str:
    """What the system says of a file, without its number."""
    if error.filename is None or error.errno is None or not error.strerror:
        return _one_line(error)
    what = {
        errno.ENOENT: "there is no such file or folder",
        errno.EISDIR: "this is a folder, and no file",
        errno.ENOTDIR: "a part of this is a file, and no folder",
        errno.EEXIST: "this exists already",
        errno.EACCES: "this is not allowed",
    }.get(error.errno)
    return f"`{os.fsdecode(error.filename)}`: {what or error.strerror[:1].lower() + error.strerror[1:]}."


@contextmanager
def _told_in_a_line() -> Iterator[None]:
    """
    A user's mistake is told in a line, with exit code 2: a value that is refused, a file or a package that is not
    there. Anything else, but for an interruption, is ours, and keeps its traceback.
    """
    try:
        with _interruptible():
            yield
    except (typer.Exit, typer.Abort):  # RuntimeErrors both
        raise
    except BrokenPipeError as error:  # `llada-uni ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from error
    except OSError as error:
        typer.echo(f"llada-uni: {_sentence(error)}", err=True)
        raise typer.Exit(2) from error
    except (ValueError, TypeError, ImportError) as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if isinstance(error, TypeError) and "llada_uni" not in frame.f_globals["__name__"]:
            raise
        typer.echo(f"llada-uni: {_one_line(error)}", err=True)
        raise typer.Exit(2) from error
    except (RuntimeError, MemoryError) as error:
        from accelerate.utils.memory import should_reduce_batch_size

        if not (isinstance(error, MemoryError) or should_reduce_batch_size(error)):
            raise
        line = "memory does not suffice; `llada-uni info` says what fits, --batch-size and --size make less of it."
        typer.echo(f"llada-uni: {line}", err=True)
        raise typer.Exit(2) from error


class Command(typer.core.TyperCommand):
    """A command whose mistakes are told in a line; of words too many it says how they were meant."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.allow_extra_args = any(parameter.name in ("prompt", "question") for parameter in self.params)
        super().parse_args(ctx, args)
        if extra := ctx.args:
            from .image_files import SUFFIXES

            if "image" in ctx.params and all(Path(word).suffix.lower() in SUFFIXES for word in extra):
                hint = f"An image is given by `--image {extra[0]}`."
            else:
                first = ctx.params.get("prompt") or ctx.params.get("question")
                hint = f'Several words stand in quotes: `{ctx.command_path} "{" ".join([first, *extra])}"`.'
            ctx.fail(f"Got unexpected extra arguments ({' '.join(extra)}). {hint}")
        return ctx.args

    def invoke(self, ctx: Any) -> Any:
        with _told_in_a_line():
            return super().invoke(ctx)


class CommandsWithHints(typer.core.TyperGroup):
    """All commands; options of one that stand before it are told where they belong."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        options = {name for command in self.commands.values() for option in command.params for name in option.opts}
        first = args[0].partition("=")[0] if args else ""
        if first in options and first not in {name for option in self.get_params(ctx) for name in option.opts}:
            command = next((word for word in args if word in self.commands), "COMMAND")
            ctx.fail(f"Options stand behind the command: `{ctx.command_path} {command} {first} ...`.")
        return super().parse_args(ctx, args)


app = typer.Typer(
    name="llada-uni",
    cls=CommandsWithHints,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # errors in a line, help without boxes
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _tell_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"llada-uni {version('llada-uni')}")
        raise typer.Exit


@app.callback()
def _common(
    is_version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Say which version this is.")
    ] = False,
) -> None:
    """LLaDA2.0-Uni: draw, edit, ask and tell, with one masked-diffusion model."""


IMAGES_AND_TEXT = (draw, edit, fill, ask, chat, story, encode, decode)
for command in (*IMAGES_AND_TEXT, info, serve, demo, convert, consolidate, merge, assemble):
    app.command(cls=Command)(command)

evaluation = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Score a model: images, answers, likelihoods, lm-eval's tasks.",
)
app.add_typer(evaluation, name="evaluate")
for name, scoring in evaluate.COMMANDS.items():
    evaluation.command(name, cls=Command)(scoring)

training = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Train a stage; `llada-uni train sft --help` has its options."
)
app.add_typer(training, name="train")


def _add_stage(stage: str, what: str) -> None:
    # The options of a stage are those of its trainer's dataclasses; they parse them, and tell of them.
    settings = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}

    @training.command(stage, help=f"Train {what}.", context_settings=settings, add_help_option=False)
    def train(context: typer.Context) -> None:
        with _told_in_a_line():
            run = prepare(stage, context.args)
        with _interruptible():
            run()


for stage, what in STAGES.items():
    _add_stage(stage, what)


def main(arguments: list[str] | None = None) -> None:
    """
    Raises:
        SystemExit: with 2 for a mistake, 130 after Ctrl-C.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed, and the next file to be opened would be it
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a prompt that the terminal cannot show is no failure
            stream.reconfigure(errors="backslashreplace")
    # What is imported stays; to look it through after every 700 new objects takes an eighth of the start.
    gc.set_threshold(10_000, *gc.get_threshold()[1:])
    try:
        app(arguments, prog_name="llada-uni")
    except SystemExit as end:
        if end.code:
            raise


if __name__ == "__main__":
    main()
