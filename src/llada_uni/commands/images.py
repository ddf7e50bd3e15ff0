"""`draw`, `edit` and `fill`: images of prompts, kept in a folder with a manifest."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .loading import load
from .options import (
    AsJson,
    BatchSize,
    BlockSteps,
    Device,
    Dtype,
    Guidance,
    Model,
    NumImages,
    Output,
    PromptsFile,
    Seed,
    Size,
    Steps,
    sampling,
    size_of,
)
from .prompt_files import PromptRow, requests_of


if TYPE_CHECKING:
    from diffusers_llada_uni import LLaDAUniPipeline

SIZE = ("height", "width", "upscale")
Candidates = Annotated[int, typer.Option("--num-candidates", min=1, help="Sample so many for each, keep the best.")]
CodesTemperature = Annotated[float | None, typer.Option(min=0, help="Of sampled image codes; 0 takes the surest.")]
Upscale = Annotated[int, typer.Option(min=1, max=4, help="A code becomes 16 times this many pixels down and across.")]


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
    if max_thinking_tokens is not None and not thinking:
        raise ValueError("`--max-thinking-tokens` are of thoughts: give `--thinking` with it.")
    settings = {
        **size_of(size),
        "guidance_scale": guidance,
        "num_inference_steps": steps,
        "num_steps_per_block": steps_per_block,
        "thinking": thinking or None,
        "thinking_kwargs": max_thinking_tokens and {"max_new_tokens": max_thinking_tokens},
        **_rarely_set(upscale, num_candidates, temperature),
    }
    plan = {"seed": seed, "num_images": num_images, "batch_size": batch_size}
    _make(requests_of("draw", prompt, prompts), output, (model, device, dtype), as_json, **plan, **settings)


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
    settings = {
        "guidance_scale": guidance,
        "image_guidance_scale": image_guidance,
        "num_inference_steps": steps,
        "num_steps_per_block": steps_per_block,
        **_rarely_set(upscale),
    }
    plan = {"seed": seed, "num_images": num_images, "batch_size": batch_size}
    _make(requests_of("edit", prompt, prompts, image), output, (model, device, dtype), as_json, **plan, **settings)


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
    settings = {
        "guidance_scale": guidance,
        "num_inference_steps": steps,
        "num_steps_per_block": steps_per_block,
        **_rarely_set(upscale, num_candidates, temperature),
    }
    plan = {"seed": seed, "num_images": num_images, "batch_size": batch_size}
    requests = requests_of("fill", prompt, prompts, image, mask)
    _make(requests, output, (model, device, dtype), as_json, **plan, **settings)


def _rarely_set(upscale: int, num_candidates: int = 1, temperature: float | None = None) -> dict[str, Any]:
    """Settings that are left out at their defaults: what a run before made without them is found again."""
    if num_candidates > 1 and temperature == 0:
        raise ValueError(
            "`--num-candidates` would all be the same at `--temperature 0`, which takes the surest codes."
        )
    return {
        "upscale": upscale if upscale != 2 else None,
        "num_candidates": num_candidates if num_candidates > 1 else None,
        "generation_kwargs": None if temperature is None else {"do_sample": False, **sampling(temperature)},
    }


def _make(
    requests: list[PromptRow], output: Path, model: tuple[str, str | None, str], as_json: bool, **settings: Any
) -> None:
    """
    What all three have in common.

    Args:
        model: Name, device, dtype.
        **settings: Of `make_images` and of the pipeline's call; `None` is left out.
    """
    from ..pipeline_loading import resolve_model

    resolve_model(model[0])  # before torch is imported, and the folder made
    from diffusers_llada_uni.evaluation.image_making import Request, make_images
    from diffusers_llada_uni.evaluation.manifest import Manifest

    manifest = Manifest(output)
    settings = {key: value for key, value in settings.items() if value is not None}
    asked = [Request(*request) for request in requests]
    pipe = load(*model)
    check_lengths(pipe, requests, **{name: settings[name] for name in SIZE if name in settings})
    for _, entry, is_new in make_images(pipe, asked, manifest, **settings):
        tell(entry, is_new, output, as_json)


def check_lengths(
    pipe: "LLaDAUniPipeline",
    requests: list[PromptRow],
    height: int | None = None,
    width: int | None = None,
    upscale: int = 2,
) -> None:
    """
    Of what is drawn without an image: that all prompts leave room for one, before the first is made.

    Args:
        pipe: The pipeline.
        requests: What is asked.
        height, width, upscale: As in the pipeline's call.

    Raises:
        ValueError: for a size that is none, and for the first prompt that is too long; of several it says which.
    """
    coder = pipe.code_generator
    drawn = [(number, request.prompt) for number, request in enumerate(requests, 1) if not request.images]
    if not drawn:
        return
    grid = coder.grid_of(height, width, upscale)
    for number, prompt in drawn:
        try:
            coder.write_prompts([prompt], grid, upscale=upscale)
        except ValueError as error:
            where = f"Prompt {number} ({prompt[:40]!r}...): " if len(requests) > 1 else ""
            raise ValueError(f"{where}{error}") from error


def tell(entry: dict[str, Any], is_new: bool, output: Path, as_json: bool) -> None:
    """Writes of an image where it is, or its entry of the manifest."""
    if as_json:
        typer.echo(json.dumps({**entry, "is_new": is_new}, ensure_ascii=False))
    else:
        seconds = f"{entry['seconds']:.1f} s" if is_new else "was there"
        typer.echo(f"{output / entry['file']}  ({seconds})")
