"""The options that several commands share: declared once, so that they are called and explained the same."""

from pathlib import Path
from typing import Annotated, Any

import typer


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
BatchSize = Annotated[int, typer.Option(min=1, help="Images made at once.")]
Tokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Most tokens of an answer.")]
Host = Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 is all the world.")]


def size_of(size: str | None) -> dict[str, int]:
    """The pipeline's `width` and `height`; nothing where `size` is `None`."""
    if size is None:
        return {}
    width, cross, height = size.lower().partition("x")
    if not (cross and width.isdecimal() and height.isdecimal()):
        raise ValueError(f"`size` must be WIDTHxHEIGHT, got {size!r}.")
    return {"width": int(width), "height": int(height)}


def sampling(temperature: float) -> dict[str, Any]:
    """Settings of generation; none at 0, which takes the surest."""
    return {"do_sample": True, "temperature": temperature} if temperature else {}
