"""
The command `llada-uni`: its options, and what they are called. What they do is in `llada_uni.commands`; that and torch
are imported once a command runs, so that `--help` comes at once.
"""

import errno
import io
import ipaddress
import json
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
import typer.core

from .commands.train import STAGES, prepare


if TYPE_CHECKING:
    from diffusers_llada_uni import LLaDAUniPipeline

    from .answers import ChatModel
    from .commands.prompt_files import PromptRow


class CommandWithHints(typer.core.TyperCommand):
    """A command that says of words too many how they were meant."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.allow_extra_args = True
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


class PageFormat(StrEnum):
    MARKDOWN = "md"
    HTML = "html"


Model = Annotated[str, typer.Option("--model", "-m", help="A folder, a Hub repository, or `emoji`.")]
Device = Annotated[str | None, typer.Option(help="cuda, cuda:1, mps, cpu. Default: the best there is.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of all randomness.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="The folder for results and their manifest.")]
PromptsFile = Annotated[
    str | None,
    typer.Option(
        "--prompts",
        "-p",
        help="A file of prompts in place of one; - is standard input. Text has one in each line; JSON, JSONL, CSV and "
        "parquet have `prompt` and, where they are of use, `image` (a path or a list of them, seen from the file), "
        "`mask` and `seed`.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="A line of JSON for each result, on standard output.")]
Size = Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels.")]
NumImages = Annotated[int, typer.Option("--num-images", "-n", min=1, help="Images of each prompt.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Steps of the decoder.")]
BlockSteps = Annotated[int, typer.Option("--steps-per-block", min=1, help="Steps of a block of image codes.")]
Guidance = Annotated[float | None, typer.Option(min=0, help="Guidance by the prompt; 1 is none.")]
Candidates = Annotated[int, typer.Option("--num-candidates", min=1, help="Sample so many for each, keep the best.")]
CodesTemperature = Annotated[float | None, typer.Option(min=0, help="Of sampled image codes; 0 takes the surest.")]
Upscale = Annotated[int, typer.Option(min=1, max=4, help="A code becomes 16 times this many pixels down and across.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images made at once.")]
Tokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Most tokens of an answer.")]
Images = Annotated[list[str] | None, typer.Option("--image", "-i", help="An image to look at; more than once.")]
Temperature = Annotated[float, typer.Option(min=0, help="0 takes the surest words.")]


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
    except (ValueError, TypeError, ModuleNotFoundError) as error:
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


def _load(model: str, device: str | None, dtype: str) -> "LLaDAUniPipeline":
    from .pipeline_loading import load_pipeline, resolve_model

    resolve_model(model)  # before torch is imported
    _hide_progress_bars()
    pipe = load_pipeline(model, device, dtype)
    pipe.set_progress_bar_config(disable=not sys.stderr.isatty())
    return pipe


def _load_to_talk(model: str, device: str | None, dtype: str) -> "ChatModel":
    from .pipeline_loading import load_chat_model, resolve_model

    resolve_model(model, takes_models=True)  # before torch is imported
    _hide_progress_bars()
    return load_chat_model(model, device, dtype)


def _hide_progress_bars() -> None:
    """Of what is loaded, where nobody looks."""
    if not sys.stderr.isatty():
        import diffusers
        import transformers

        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()


def _size(size: str | None) -> dict[str, int]:
    if size is None:
        return {}
    width, cross, height = size.lower().partition("x")
    if not (cross and width.isdecimal() and height.isdecimal()):
        raise ValueError(f"`size` must be WIDTHxHEIGHT, got {size!r}.")
    return {"width": int(width), "height": int(height)}


def _check_request(command: str, images: Sequence[str], mask: str | None, where: str = "") -> None:
    wants_image, wants_mask = command != "draw", command == "fill"
    if bool(images) != wants_image and command != "ask":
        raise ValueError(f"{where}`image` is {'missing' if wants_image else 'for `edit` and `fill`'}.")
    if (mask is not None) != wants_mask:
        raise ValueError(f"{where}`mask` is {'missing' if wants_mask else 'for `fill`'}.")


def _requests(
    command: Literal["draw", "edit", "fill", "ask"],
    prompt: str | None,
    prompts: str | None,
    images: list[str] | None = None,
    mask: str | None = None,
) -> "list[PromptRow]":
    """What a command is asked, once or by a file; all is looked at before anything is made, or torch imported."""
    from .commands.prompt_files import PromptRow, check_text, read_prompts
    from .image_files import open_image

    what = "question" if command == "ask" else "prompt"
    if (prompt is None) == (prompts is None):
        raise ValueError(f"Give a {what}, or `--prompts` with a file of them.")
    if prompts is not None and (images or mask):
        raise ValueError(f"`--image` and `--mask` are for one {what}; with `--prompts` its file names them.")
    if prompt is not None:
        if not prompt.strip():
            raise ValueError(f"`{what}` is empty.")
        check_text(prompt, f"`{what}`")
        _check_request(command, images or [], mask)
    requests = None if prompts is None else read_prompts(prompts)
    for number, request in enumerate(requests or [], 1):
        _check_request(command, request.images, request.mask, f"{prompts}, row {number}: ")

    requests = [PromptRow(prompt or "", tuple(images or ()), mask)] if requests is None else requests
    for request in requests:
        sizes = [open_image(path).size for path in request.images]
        if request.mask is not None and open_image(request.mask, "mask").size != sizes[0]:
            raise ValueError(f"`mask` {request.mask} must be as large as the image, {sizes[0][0]} x {sizes[0][1]}.")
    return requests


def _rarely_set(upscale: int, num_candidates: int = 1, temperature: float | None = None) -> dict[str, Any]:
    """Settings that are left out at their defaults: what a run before made without them is found again."""
    return {
        "upscale": upscale if upscale != 2 else None,
        "num_candidates": num_candidates if num_candidates > 1 else None,
        "generation_kwargs": None if temperature is None else {"do_sample": False, **_sampling(temperature)},
    }


def _make(
    requests: "list[PromptRow]",
    output: Path,
    model: tuple[str, str | None, str],
    plan: dict[str, int],
    settings: dict[str, Any],
    as_json: bool,
) -> None:
    """
    What `draw`, `edit` and `fill` have in common.

    Args:
        model: Name, device, dtype.
        plan: `seed`, `num_images`, `batch_size`.
        settings: Of the pipeline's call; `None` is left out.
    """
    from .pipeline_loading import resolve_model

    resolve_model(model[0])  # before torch is imported, and the folder made
    from diffusers_llada_uni.evaluation.image_making import Request, make_images
    from diffusers_llada_uni.evaluation.manifest import Manifest

    manifest = Manifest(output)
    settings = {key: value for key, value in settings.items() if value is not None}
    asked = [Request(*request) for request in requests]
    for _, entry, is_new in make_images(_load(*model), asked, manifest, **plan, **settings):
        _tell(entry, is_new, output, as_json)


def _tell(entry: dict[str, Any], is_new: bool, output: Path, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({**entry, "is_new": is_new}, ensure_ascii=False))
    else:
        seconds = f"{entry['seconds']:.1f} s" if is_new else "was there"
        typer.echo(f"{output / entry['file']}  ({seconds})")


@app.command(cls=CommandWithHints)
def draw(
    prompt: Annotated[str | None, typer.Argument(help="What to draw.")] = None,
    prompts: PromptsFile = None,
    output: Output = Path("images"),
    model: Model = "emoji",
    size: Size = None,
    num_images: NumImages = 1,
    num_candidates: Candidates = 1,
    temperature: CodesTemperature = None,
    seed: Seed = 0,
    guidance: Guidance = None,
    steps: Steps = None,
    steps_per_block: BlockSteps = 8,
    upscale: Upscale = 2,
    thinking: Annotated[bool, typer.Option("--thinking", help="Let the model think first.")] = False,
    max_thinking_tokens: Annotated[int | None, typer.Option(min=1, help="Of thoughts; 1024 by default.")] = None,
    batch_size: BatchSize = 8,
    device: Device = None,
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Draw images from prompts."""
    with _told_in_a_line():
        settings = {
            **_size(size),
            "guidance_scale": guidance,
            "num_inference_steps": steps,
            "num_steps_per_block": steps_per_block,
            "thinking": thinking or None,
            "thinking_kwargs": max_thinking_tokens and {"max_new_tokens": max_thinking_tokens},
            **_rarely_set(upscale, num_candidates, temperature),
        }
        plan = {"seed": seed, "num_images": num_images, "batch_size": batch_size}
        requests = _requests("draw", prompt, prompts)
        _make(requests, output, (model, device, dtype), plan, settings, as_json)


@app.command(cls=CommandWithHints)
def edit(
    image: Annotated[list[str] | None, typer.Option("--image", "-i", help="The source; more are references.")] = None,
    prompt: Annotated[str | None, typer.Argument(help="What to change.")] = None,
    prompts: PromptsFile = None,
    output: Output = Path("images"),
    model: Model = "emoji",
    num_images: NumImages = 1,
    seed: Seed = 0,
    guidance: Guidance = None,
    image_guidance: Annotated[float, typer.Option(min=0, help="Guidance by the source.")] = 0.0,
    steps: Steps = None,
    steps_per_block: BlockSteps = 8,
    upscale: Upscale = 2,
    batch_size: BatchSize = 8,
    device: Device = None,
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Change images as prompts say."""
    with _told_in_a_line():
        settings = {
            "guidance_scale": guidance,
            "image_guidance_scale": image_guidance,
            "num_inference_steps": steps,
            "num_steps_per_block": steps_per_block,
            **_rarely_set(upscale),
        }
        plan = {"seed": seed, "num_images": num_images, "batch_size": batch_size}
        requests = _requests("edit", prompt, prompts, image)
        _make(requests, output, (model, device, dtype), plan, settings, as_json)


@app.command(cls=CommandWithHints)
def fill(
    image: Annotated[list[str] | None, typer.Option("--image", "-i", help="The image with the part to make.")] = None,
    mask: Annotated[str | None, typer.Option(help="White where it is to be made anew; of the same size.")] = None,
    prompt: Annotated[str | None, typer.Argument(help="What the whole image shows.")] = None,
    prompts: PromptsFile = None,
    output: Output = Path("images"),
    model: Model = "emoji",
    num_images: NumImages = 1,
    num_candidates: Candidates = 1,
    temperature: CodesTemperature = None,
    seed: Seed = 0,
    guidance: Guidance = None,
    steps: Steps = None,
    steps_per_block: BlockSteps = 8,
    upscale: Upscale = 2,
    batch_size: BatchSize = 8,
    device: Device = None,
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Make the masked part of images anew."""
    with _told_in_a_line():
        settings = {
            "guidance_scale": guidance,
            "num_inference_steps": steps,
            "num_steps_per_block": steps_per_block,
            **_rarely_set(upscale, num_candidates, temperature),
        }
        plan = {"seed": seed, "num_images": num_images, "batch_size": batch_size}
        requests = _requests("fill", prompt, prompts, image, mask)
        _make(requests, output, (model, device, dtype), plan, settings, as_json)


def _sampling(temperature: float) -> dict[str, Any]:
    return {"do_sample": True, "temperature": temperature} if temperature else {}


@app.command(cls=CommandWithHints)
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
    with _told_in_a_line():
        requests = _requests("ask", question, prompts, image)

        chat_model = _load_to_talk(model, device, dtype)
        from .answers import stream_answer
        from .commands.talk import message
        from .image_files import open_image

        for request in requests:
            messages = [message("user", request.prompt, [open_image(path) for path in request.images])]
            answer_seed = seed if request.seed is None else request.seed
            pieces = stream_answer(chat_model, messages, max_new_tokens, answer_seed, **_sampling(temperature))
            if as_json:
                entry = {"prompt": request.prompt, "image": list(request.images), "answer": "".join(pieces)}
                typer.echo(json.dumps(entry, ensure_ascii=False))
                continue
            for piece in pieces:
                typer.echo(piece, nl=False)
            typer.echo()


@app.command()
def chat(
    model: Model = "emoji",
    max_new_tokens: Tokens = 1024,
    temperature: Temperature = 0.0,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Talk with the model; images by /image PATH."""
    with _told_in_a_line():
        chat_model = _load_to_talk(model, device, dtype)
        from .commands.talk import HELP, converse

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
        converse(chat_model, lines, lambda text: typer.echo(text, nl=False), max_new_tokens, **_sampling(temperature))


@app.command(cls=CommandWithHints)
def story(
    prompt: Annotated[str, typer.Argument(help="What to tell.")],
    image: Annotated[
        list[str] | None, typer.Option("--image", "-i", help="An image before it; more than once.")
    ] = None,
    output: Output = Path("story"),
    page: Annotated[PageFormat, typer.Option("--format", "-f", help="Of the page.")] = PageFormat.MARKDOWN,
    model: Model = "emoji",
    max_images: Annotated[int, typer.Option(min=1, help="Most images.")] = 4,
    size: Size = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Tell a story with images, as a page in a folder of its own."""
    with _told_in_a_line():
        if output.exists():
            raise FileExistsError(f"`output` {str(output)!r} exists already; `--output` names another folder.")
        from .image_files import open_image
        from .pipeline_loading import resolve_model

        images = [open_image(path) for path in image or []]
        resolve_model(model)  # before torch is imported
        import torch

        from diffusers_llada_uni.evaluation.manifest import make_folder

        from .commands.story import write_story

        make_folder(output.parent)
        pipe = _load(model, device, dtype)
        generator = torch.Generator().manual_seed(seed)
        settings: dict[str, Any] = {"image": images or None, "generator": generator, **_size(size)}
        parts = pipe.interleave(prompt, max_images=max_images, **settings)
        typer.echo(write_story(parts, output, prompt, page.value))


@app.command()
def encode(
    image: Annotated[list[str], typer.Argument(help="Images.")],
    model: Model = "emoji",
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Turn images into codes: on standard output, a line for each."""
    with _told_in_a_line():
        from .commands.codes import encode_images
        from .image_files import open_image

        for path in image:
            open_image(path)
        for entry in encode_images(_load(model, device, dtype), image):
            typer.echo(json.dumps(entry))


@app.command()
def decode(
    codes: Annotated[str, typer.Argument(help="A file that `encode` has written.")],
    output: Output = Path("images"),
    model: Model = "emoji",
    seed: Seed = 0,
    steps: Steps = None,
    device: Device = None,
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Turn codes into images."""
    with _told_in_a_line():
        from .commands.codes import decode_codes, read_codes
        from .pipeline_loading import resolve_model

        entries = read_codes(codes)
        resolve_model(model)  # before torch is imported, and the folder made
        from diffusers_llada_uni.evaluation.manifest import Manifest

        manifest = Manifest(output)
        for entry, is_new in decode_codes(_load(model, device, dtype), entries, manifest, seed, steps):
            _tell(entry, is_new, output, as_json)


@app.command()
def info(
    model: Annotated[str, typer.Argument(help="A folder, a Hub repository, or `emoji`.")] = "emoji",
    as_json: Annotated[bool, typer.Option("--json", help="One object of JSON.")] = False,
) -> None:
    """
    Say what a folder holds, and how it fits into this machine.

    Of a repository of the Hub only the configurations are fetched.
    """
    with _told_in_a_line():
        from .commands.info import advise, describe_folder, machine_memory
        from .pipeline_loading import configurations_of

        described = describe_folder(configurations_of(model))
        described["advice"] = advise(described, machine_memory())
        if as_json:
            typer.echo(json.dumps(described))
            return
        typer.echo(described["path"])
        for name, component in described["components"].items():
            size = f"{component['parameters'] / 1e6:10.1f} M" if component["parameters"] else " " * 12
            kinds = ", ".join(component["dtypes"]) if component["is_complete"] else "without its weights"
            typer.echo(f"  {name:20} {size}  {component['class']}  {kinds}".rstrip())
        for line in described["advice"]:
            typer.echo(line)


def _is_loopback(host: str) -> bool:
    """Whether who listens at `host` is reached from this machine alone, as far as its name says."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


@app.command()
def serve(
    model: Model = "emoji",
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 is all the world.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Where to listen; 0 is any that is free.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="LLADA_UNI_API_KEY", help="What clients must send; needed where others can reach it."),
    ] = None,
    no_api_key: Annotated[
        bool, typer.Option("--no-api-key", help="Let in whoever can reach --host, without a key.")
    ] = False,
    name: Annotated[str | None, typer.Option(help="What clients call the model. Default: the folder's name.")] = None,
    max_rows: Annotated[int, typer.Option(min=1, help="Answers under work at once.")] = 32,
    max_batch_images: Annotated[int, typer.Option(min=1, help="Images made at once.")] = 16,
    max_waiting: Annotated[int, typer.Option(min=1, help="Requests that may wait, of text and images each.")] = 256,
    max_new_tokens: Tokens = 1024,
    max_side: Annotated[int, typer.Option(min=1, help="Longest side of an image, in pixels.")] = 2048,
    allow_images_from: Annotated[
        list[str] | None, typer.Option(help="A host from which images are fetched; more than once.")
    ] = None,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Serve the model as OpenAI's API: chat, images, edits."""
    with _told_in_a_line():
        if api_key == "":
            raise ValueError("`api_key` must not be empty.")
        if api_key is not None and no_api_key:
            raise ValueError("`--api-key` (or LLADA_UNI_API_KEY) and `--no-api-key` exclude each other.")
        if api_key is None and not (no_api_key or _is_loopback(host)):
            raise ValueError(
                f"`host` {host!r} lets in others than this machine: give an `--api-key`, or say `--no-api-key`."
            )
        from .commands.serve import run_server

        run_server(
            _load(model, device, dtype),
            host,
            port,
            {"max_rows": max_rows, "max_images": max_batch_images, "max_waiting": max_waiting},
            model_name=name or Path(model).resolve().name,
            api_key=api_key,
            max_new_tokens=max_new_tokens,
            max_side=max_side,
            allowed_image_hosts=frozenset(host.lower() for host in allow_images_from or ()),
        )


@app.command()
def demo(
    model: Model = "emoji",
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 is all the world.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where to listen.")] = 7860,
    share: Annotated[bool, typer.Option(help="Let all the world in, through a server of Gradio's.")] = False,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Show the model on a web page: draw, edit, chat, stories."""
    with _told_in_a_line():
        from .commands.demo import run_demo

        run_demo(
            lambda: _load(model, device, dtype), host, port, share, lambda url: typer.echo(f"The page is at {url}")
        )


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="The released checkpoint; with --to-released, ours.")],
    output: Annotated[Path, typer.Argument(help="The folder to write; must not exist.")],
    to_released: Annotated[bool, typer.Option("--to-released", help="Write the released layout back.")] = False,
    decoder: Annotated[str | None, typer.Option(help="turbo, normal or both. Default: what is there.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16, of the weights. Default: as they are.")
    ] = None,
    mask_token: Annotated[
        str | None, typer.Option(help="Of an autoregressive model. Default: its tokenizer's, or a new <|mask|>.")
    ] = None,
) -> None:
    """Convert a released checkpoint into a pipeline, or back; or an autoregressive one (Ling) to be trained."""
    with _told_in_a_line():
        from .conversion import convert_llada_uni_checkpoint as conversion

        if dtype is not None and dtype not in conversion.DTYPES:
            raise ValueError(f"`dtype` must be one of {', '.join(conversion.DTYPES)}, got {dtype!r}.")
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is half written is removed
        typer.echo(conversion.convert(source, output, to_released, decoder, conversion.dtype_of(dtype), mask_token))


@app.command()
def consolidate(
    checkpoint: Annotated[Path, typer.Argument(help="What a sharded training run wrote.")],
    output: Annotated[Path, typer.Argument(help="The folder to write; must not exist.")],
    max_shard_size: Annotated[str, typer.Option(help="Of the largest file.")] = "5GB",
) -> None:
    """Make one model of a sharded checkpoint."""
    with _told_in_a_line():
        from transformers_llada_uni.loading.consolidation import consolidate_checkpoint

        consolidate_checkpoint(checkpoint, output, max_shard_size)


@app.command()
def merge(
    checkpoints: Annotated[list[Path], typer.Argument(help="Two or more checkpoints; with --best, the run's folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write; must not exist.")],
    best: Annotated[int | None, typer.Option(min=2, help="Take that many checkpoints of the run, the best.")] = None,
    metric: Annotated[str, typer.Option(help="What the run has logged, by which --best chooses.")] = "eval_loss",
    greater_is_better: Annotated[
        bool, typer.Option("--greater-is-better", help="The highest is best, and not the lowest.")
    ] = False,
) -> None:
    """Make one model of the mean of several checkpoints' weights."""
    with _told_in_a_line():
        from transformers_llada_uni.loading.checkpoint_merging import best_checkpoints, merge_checkpoints

        if best is not None:
            if len(checkpoints) != 1:
                raise ValueError("With `--best` give one folder, that of the run.")
            checkpoints = best_checkpoints(checkpoints[0], best, metric, greater_is_better)
        merge_checkpoints(checkpoints, output)
        typer.echo(f"{output}: the mean of {', '.join(checkpoint.name for checkpoint in checkpoints)}")


evaluation = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Score a model: images, answers, likelihoods, lm-eval's tasks.",
)
app.add_typer(evaluation, name="evaluate")

Data = Annotated[str, typer.Argument(help="A file (JSONL, CSV, parquet), a folder, or a dataset of the Hub.")]
Results = Annotated[Path, typer.Option("--output", "-o", help="The folder for results.json and what is made.")]
Split = Annotated[str, typer.Option(help="Of the data; files are all `train`.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first rows.")]
Rows = Annotated[int, typer.Option("--batch-size", min=1, help="Rows at once; changes no result.")]
Samples = Annotated[int, typer.Option("--num-samples", min=1, help="Noisy copies of each text.")]
ResultsAsJson = Annotated[bool, typer.Option("--json", help="results.json on standard output, and no table.")]


def _report(results: dict[str, Any], output: Path, as_json: bool, **described: Any) -> None:
    from .commands.evaluate import report, table_of

    written = report(results, output, described)
    typer.echo(json.dumps(written, ensure_ascii=False) if as_json else "\n".join(table_of(results)))


@evaluation.command("images")
def evaluate_images(
    prompts: Annotated[str, typer.Option("--prompts", "-p", help="A file of prompts, as for `draw`; - is stdin.")],
    output: Results = Path("evaluation/images"),
    model: Model = "emoji",
    clip: Annotated[str | None, typer.Option(help="A CLIP model, for the score of an image and its prompt.")] = None,
    reference: Annotated[
        str | None, typer.Option(help="A folder of images, for the Frechet distance to them.")
    ] = None,
    features: Annotated[str | None, typer.Option(help="The model of images that the distance is measured by.")] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="module.function of your own, (prompts, images) -> numbers; more than once."),
    ] = None,
    size: Size = None,
    num_images: NumImages = 1,
    seed: Seed = 0,
    guidance: Guidance = None,
    steps: Steps = None,
    steps_per_block: BlockSteps = 8,
    batch_size: BatchSize = 8,
    device: Device = None,
    dtype: Dtype = "auto",
    as_json: ResultsAsJson = False,
) -> None:
    """
    Draw the images of a file of prompts, and score them.

    What `draw` has made in the folder is not made again.
    """
    with _told_in_a_line():
        if (reference is None) != (features is None):
            raise ValueError("`--reference` and `--features` go together: give both or neither.")
        if not (clip or features or metric):
            raise ValueError("Give what to score by: `--clip`, `--reference` with `--features`, or `--metric`.")
        settings = {"guidance_scale": guidance, "num_inference_steps": steps, "num_steps_per_block": steps_per_block}
        settings = {name: value for name, value in (_size(size) | settings).items() if value is not None}
        requests = _requests("draw", None, prompts)
        if any(request.seed is not None for request in requests):
            raise ValueError(f"{prompts}: `seed` is for `draw`; here `--seed` holds for all.")

        from .pipeline_loading import resolve_model

        resolve_model(model)  # before torch is imported
        from .commands.evaluate import ReferenceImages, evaluate_images, image_metrics

        plan = {"seed": seed, "num_images_per_prompt": num_images, "batch_size": batch_size}
        images = None if reference is None else ReferenceImages(reference)
        metrics, distances = image_metrics(clip, features, metric or [], device)
        pipe, texts = _load(model, device, dtype), [request.prompt for request in requests]
        pipe.set_progress_bar_config(disable=True)  # there is one of all images
        results = evaluate_images(pipe, texts, output, metrics, distances, images, **plan, **settings)
        _report(results, output, as_json, task="images", model=model, **plan, settings=settings)


@evaluation.command("questions")
def evaluate_questions(
    data: Data,
    output: Results = Path("evaluation/questions"),
    model: Model = "emoji",
    split: Split = "train",
    limit: Limit = None,
    instruction: Annotated[
        str, typer.Option(help="A line after each question, as VQAv2's are asked; '' is none.")
    ] = "Answer the question using a single word or phrase.",
    max_new_tokens: Tokens = 32,
    batch_size: Rows = 8,
    device: Device = None,
    dtype: Dtype = "auto",
    as_json: ResultsAsJson = False,
) -> None:
    """
    Ask about images, and compare with people's answers.

    The accuracy is VQAv2's. Rows have `image` (in the data, or a path seen from it), `question` and `answers`, a list.
    """
    with _told_in_a_line():
        from .pipeline_loading import resolve_model

        resolve_model(model)  # before torch is imported
        from .commands.evaluate import evaluate_questions, load_rows

        rows, folder = load_rows(data, split, limit), Path(data).parent if Path(data).is_file() else Path()
        settings: dict[str, Any] = {"instruction": instruction, "max_new_tokens": max_new_tokens}
        pipe = _load(model, device, dtype)
        results = evaluate_questions(pipe, rows, folder, output, batch_size, **settings)
        _report(results, output, as_json, task="questions", model=model, data=data, split=split, **settings)


@evaluation.command("likelihood")
def evaluate_likelihood(
    data: Data,
    output: Results = Path("evaluation/likelihood"),
    model: Model = "emoji",
    split: Split = "train",
    limit: Limit = None,
    num_samples: Samples = 32,
    block_length: Annotated[int | None, typer.Option(min=1, help="Default: the model's. 1 is exact.")] = None,
    seed: Seed = 0,
    batch_size: Rows = 8,
    device: Device = None,
    dtype: Dtype = "auto",
    as_json: ResultsAsJson = False,
) -> None:
    """
    Bound how likely the model finds texts, answers and images.

    The perplexity is an upper bound. Rows are those of training: `text`; `prompt` and `completion`; `messages`;
    `image` and `caption`. Of a row what training would learn counts, given what stands before it.
    """
    with _told_in_a_line():
        from .pipeline_loading import resolve_model

        resolve_model(model)  # before torch is imported
        from .commands.evaluate import evaluate_likelihood, load_rows

        rows = load_rows(data, split, limit)
        settings: dict[str, Any] = {"num_samples": num_samples, "block_length": block_length}
        pipe = _load(model, device, dtype)
        results = evaluate_likelihood(pipe, rows, output, seed=seed, batch_size=batch_size, **settings)
        _report(
            results, output, as_json, task="likelihood", model=model, data=data, split=split, seed=seed, **settings
        )


@evaluation.command("lm-eval")
def evaluate_tasks(
    tasks: Annotated[list[str], typer.Argument(help="Names of tasks, such as arc_easy.")],
    output: Results = Path("evaluation/lm-eval"),
    model: Model = "emoji",
    include_path: Annotated[str | None, typer.Option(help="A folder with tasks of your own, as YAML.")] = None,
    limit: Limit = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Examples before each. Default: the task's.")] = None,
    num_samples: Samples = 32,
    seed: Seed = 0,
    batch_size: Rows = 8,
    device: Device = None,
    dtype: Dtype = "auto",
    as_json: ResultsAsJson = False,
) -> None:
    """
    Run tasks of lm-eval, the Language Model Evaluation Harness.

    Tasks are of text alone. `python -m transformers_llada_uni.evaluation run --model llada-uni ...` has all options of
    lm-eval.
    """
    with _told_in_a_line():
        from .pipeline_loading import best_device, dtype_of, resolve_model

        path = resolve_model(model)  # before torch is imported
        from .commands.evaluate import evaluate_tasks

        device = device or best_device()
        name = str(dtype_of(dtype, device)).removeprefix("torch.")
        plan: dict[str, Any] = {"limit": limit, "num_fewshot": num_fewshot, "num_samples": num_samples, "seed": seed}
        results = evaluate_tasks(path, device, name, tasks, output, include_path, batch_size=batch_size, **plan)
        _report(results, output, as_json, task="lm-eval", model=model, **plan)


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
    try:
        app(arguments, prog_name="llada-uni")
    except SystemExit as end:
        if end.code:
            raise


if __name__ == "__main__":
    main()
