"""
The command `llada-uni`: its options, and what they are called. What they do is in `llada_uni.commands`; that and torch
are imported once a command runs, so that `--help` comes at once.
"""

import io
import json
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .commands.train import STAGES, prepare


if TYPE_CHECKING:
    from diffusers_llada_uni import LLaDAUniPipeline

app = typer.Typer(
    name="llada-uni",
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
    str | None, typer.Option("--prompts", "-p", help="A file of prompts: text, JSONL, CSV, parquet; - is stdin.")
]
AsJson = Annotated[bool, typer.Option("--json", help="A line of JSON for each result, on standard output.")]
Size = Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels.")]
NumImages = Annotated[int, typer.Option("--num-images", "-n", min=1, help="Images of each prompt.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Steps of the decoder.")]
BlockSteps = Annotated[int, typer.Option("--steps-per-block", min=1, help="Steps of a block of image codes.")]
Guidance = Annotated[float | None, typer.Option(min=0, help="Guidance by the prompt; 1 is none.")]
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


@contextmanager
def _told_in_a_line() -> Iterator[None]:
    """
    A user's mistake is told in a line, with exit code 2: a value that is refused, a file or a package that is not
    there. Anything else, but for an interruption, is ours, and keeps its traceback.
    """
    try:
        with _interruptible():
            yield
    except BrokenPipeError as error:  # `llada-uni ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from error
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if isinstance(error, TypeError) and "llada_uni" not in frame.f_globals["__name__"]:
            raise
        typer.echo(f"llada-uni: {' '.join(str(error).split()) or type(error).__name__}", err=True)
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
    from .models import load_pipeline

    is_terminal = sys.stderr.isatty()
    if not is_terminal:
        import diffusers
        import transformers

        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
    pipe = load_pipeline(model, device, dtype)
    pipe.set_progress_bar_config(disable=not is_terminal)
    return pipe


def _size(size: str | None) -> dict[str, int]:
    if size is None:
        return {}
    width, cross, height = size.lower().partition("x")
    if not (cross and width.isdecimal() and height.isdecimal()):
        raise ValueError(f"`size` must be WIDTHxHEIGHT, got {size!r}.")
    return {"width": int(width), "height": int(height)}


def _make(
    command: Literal["draw", "edit", "fill"],
    prompt: str | None,
    prompts: str | None,
    images: list[str] | None,
    mask: str | None,
    output: Path,
    model: tuple[str, str | None, str],
    plan: dict[str, int],
    settings: dict[str, Any],
    as_json: bool,
) -> None:
    """
    What the three commands have in common.

    Args:
        model: Name, device, dtype.
        plan: `seed`, `num_images`, `batch_size`.
        settings: Of the pipeline's call; `None` is left out.
    """
    from .commands.requests import Request, read_requests

    if (prompt is None) == (prompts is None):
        raise ValueError("Give a prompt, or `--prompts` with a file of them.")
    if prompts is not None and (images or mask):
        raise ValueError("`--image` and `--mask` are for one prompt; with `--prompts` its file names them.")
    requests = [Request(prompt or "", tuple(images or ()), mask)] if prompts is None else read_requests(prompts)
    wants_image, wants_mask = command != "draw", command == "fill"
    for number, request in enumerate(requests, 1):
        where = "" if prompts is None else f"{prompts}, row {number}: "
        if bool(request.images) != wants_image:
            raise ValueError(f"{where}`image` is {'missing' if wants_image else 'for `edit` and `fill`'}.")
        if (request.mask is not None) != wants_mask:
            raise ValueError(f"{where}`mask` is {'missing' if wants_mask else 'for `fill`'}.")

    from .commands.images import make_images, open_image
    from .commands.manifest import Manifest
    from .models import resolve_model

    def tell(entry: dict[str, Any], is_new: bool) -> None:
        if as_json:
            typer.echo(json.dumps({**entry, "is_new": is_new}, ensure_ascii=False))
        else:
            seconds = f"{entry['seconds']:.1f} s" if is_new else "was there"
            typer.echo(f"{output / entry['file']}  ({seconds})")

    for request in requests:  # all are looked at before the first is made
        sizes = [open_image(path).size for path in request.images]
        if request.mask is not None and open_image(request.mask, "mask").size != sizes[0]:
            raise ValueError(f"`mask` {request.mask} must be as large as the image, {sizes[0][0]} x {sizes[0][1]}.")
    settings = {key: value for key, value in settings.items() if value is not None}
    if plan["num_images"] > 1:  # they would be the same one, were their codes not drawn
        settings["generation_kwargs"] = {"do_sample": True}
    name, manifest = resolve_model(model[0]), Manifest(output)
    make_images(_load(*model), name, requests, manifest, settings, **plan, on_entry=tell)


@app.command()
def draw(
    prompt: Annotated[str | None, typer.Argument(help="What to draw.")] = None,
    prompts: PromptsFile = None,
    output: Output = Path("images"),
    model: Model = "emoji",
    size: Size = None,
    num_images: NumImages = 1,
    seed: Seed = 0,
    guidance: Guidance = None,
    steps: Steps = None,
    steps_per_block: BlockSteps = 8,
    thinking: Annotated[bool, typer.Option("--thinking", help="Let the model think first.")] = False,
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
        }
        plan = {"seed": seed, "num_images": num_images, "batch_size": batch_size}
        where = output, (model, device, dtype)
        _make("draw", prompt, prompts, None, None, *where, plan, settings, as_json)


@app.command()
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
        }
        plan = {"seed": seed, "num_images": num_images, "batch_size": batch_size}
        where = output, (model, device, dtype)
        _make("edit", prompt, prompts, image, None, *where, plan, settings, as_json)


@app.command()
def fill(
    image: Annotated[list[str] | None, typer.Option("--image", "-i", help="The image with the part to make.")] = None,
    mask: Annotated[str | None, typer.Option(help="White where it is to be made anew; of the same size.")] = None,
    prompt: Annotated[str | None, typer.Argument(help="What the whole image shows.")] = None,
    prompts: PromptsFile = None,
    output: Output = Path("images"),
    model: Model = "emoji",
    num_images: NumImages = 1,
    seed: Seed = 0,
    guidance: Guidance = None,
    steps: Steps = None,
    steps_per_block: BlockSteps = 8,
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
        }
        plan = {"seed": seed, "num_images": num_images, "batch_size": batch_size}
        where = output, (model, device, dtype)
        _make("fill", prompt, prompts, image, mask, *where, plan, settings, as_json)


def _sampling(temperature: float) -> dict[str, Any]:
    return {"do_sample": True, "temperature": temperature} if temperature else {}


@app.command()
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
        from .commands.requests import Request, read_requests

        if (question is None) == (prompts is None):
            raise ValueError("Give a question, or `--prompts` with a file of them.")
        if prompts is not None and image:
            raise ValueError("`--image` is for one question; with `--prompts` the file names the images.")
        requests = [Request(question or "", tuple(image or ()))] if prompts is None else read_requests(prompts)
        if any(request.mask is not None for request in requests):
            raise ValueError("`mask` is for `fill`.")

        from .answers import stream_answer
        from .commands.images import open_image
        from .commands.talk import message

        conversations = [
            [message("user", request.prompt, [open_image(path) for path in request.images])] for request in requests
        ]
        pipe = _load(model, device, dtype)
        for request, messages in zip(requests, conversations, strict=True):
            answer_seed = seed if request.seed is None else request.seed
            pieces = stream_answer(pipe, messages, max_new_tokens, answer_seed, **_sampling(temperature))
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
        from .commands.talk import HELP, converse

        pipe = _load(model, device, dtype)
        is_terminal = sys.stdin.isatty()
        if is_terminal:
            typer.echo(HELP)

        def lines() -> Iterator[str]:
            while True:
                if is_terminal:
                    typer.echo("> ", nl=False)
                if not (line := sys.stdin.readline()):
                    return
                yield line

        converse(pipe, lines(), lambda text: typer.echo(text, nl=False), max_new_tokens, **_sampling(temperature))


@app.command()
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
            raise FileExistsError(f"`output` {str(output)!r} exists already.")
        import torch

        from .commands.images import open_image
        from .commands.manifest import make_folder
        from .commands.story import write_story

        images = [open_image(path) for path in image or []]
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
    """Turn images into codes: a line of JSON for each, on standard output."""
    with _told_in_a_line():
        from .commands.codes import encode_images
        from .commands.images import open_image

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
        from .commands.manifest import Manifest
        from .models import resolve_model

        entries, name, manifest = read_codes(codes), resolve_model(model), Manifest(output)
        pipe = _load(model, device, dtype)
        for entry in decode_codes(pipe, name, entries, manifest, seed, steps):
            typer.echo(json.dumps(entry) if as_json else output / entry["file"])


@app.command()
def info(
    model: Annotated[str, typer.Argument(help="A folder, or `emoji`.")] = "emoji", as_json: AsJson = False
) -> None:
    """Say what a folder holds, and how it fits into this machine."""
    with _told_in_a_line():
        from .commands.info import advise, describe_folder, machine_memory
        from .models import resolve_model

        path = model if Path(model, "config.json").is_file() else resolve_model(model)
        described = describe_folder(path)
        described["advice"] = advise(described["components"], machine_memory())
        if as_json:
            typer.echo(json.dumps(described))
            return
        typer.echo(described["path"])
        for name, component in described["components"].items():
            size = f"{component['parameters'] / 1e6:10.1f} M" if component["parameters"] else " " * 12
            typer.echo(f"  {name:20} {size}  {component['class']}  {', '.join(component['dtypes'])}")
        for line in described["advice"]:
            typer.echo(line)


@app.command()
def serve(
    model: Model = "emoji",
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 is all the world.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="LLADA_UNI_API_KEY", help="What clients must send. Default: none."),
    ] = None,
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
        from .commands.serve import run_server

        if api_key == "":
            raise ValueError("`api_key` must not be empty.")
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
def convert(
    source: Annotated[Path, typer.Argument(help="The released checkpoint; with --to-released, ours.")],
    output: Annotated[Path, typer.Argument(help="The folder to write; must not exist.")],
    to_released: Annotated[bool, typer.Option("--to-released", help="Write the released layout back.")] = False,
    decoder: Annotated[str | None, typer.Option(help="turbo or normal. Default: both, where they are there.")] = None,
) -> None:
    """Convert a released checkpoint into a pipeline's folder, or back."""
    from .conversion.convert_llada_uni_checkpoint import main as run

    arguments = [str(source), str(output), *(["--to-released"] if to_released else [])]
    raise typer.Exit(run([*arguments, *(["--decoder", decoder] if decoder else [])]))


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
