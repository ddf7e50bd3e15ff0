"""`encode` and `decode`: images to codes, and codes to images."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from .images import Upscale, tell
from .loading import load
from .options import AsJson, Device, Dtype, Model, Output, Seed, Steps


if TYPE_CHECKING:
    import PIL.Image

    from diffusers_llada_uni import LLaDAUniPipeline
    from diffusers_llada_uni.evaluation.manifest import Manifest


def encode(
    image: Annotated[list[str], typer.Argument(help="Images.")],
    model: Model = "emoji",
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Turn images into codes: on standard output, a line for each."""
    from ..image_files import open_image

    for path in image:
        open_image(path)
    for entry in encode_images(load(model, device, dtype), image):
        typer.echo(json.dumps(entry))


def decode(
    codes: Annotated[str, typer.Argument(help="A file that `encode` has written.")],
    output: Output = Path("images"),
    model: Model = "emoji",
    seed: Seed = 0,
    steps: Steps = None,
    upscale: Upscale = 2,
    device: Device = None,
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Turn codes into images."""
    from ..pipeline_loading import resolve_model

    entries = read_codes(codes)
    resolve_model(model)  # before torch is imported, and the folder made
    from diffusers_llada_uni.evaluation.manifest import Manifest

    manifest = Manifest(output)
    for entry, is_new in decode_codes(load(model, device, dtype), entries, manifest, seed, steps, upscale):
        tell(entry, is_new, output, as_json)


def encode_images(pipe: "LLaDAUniPipeline", paths: list[str]) -> Iterator[dict[str, Any]]:
    """
    For each image `{"image", "grid", "codes"}`: its path, height and width in codes, and the codes row by row.

    Args:
        pipe: With `model` and `processor`.
        paths: Of the images.
    """
    from ..image_files import open_image

    for path in paths:
        (codes,) = pipe.encode_images(open_image(path), "understanding")
        yield {"image": path, "grid": list(codes.shape), "codes": codes.flatten().tolist()}


def read_codes(path: str) -> list[dict[str, Any]]:
    """
    What `encode` has written: lines of JSON with `grid` and `codes`.

    Raises:
        ValueError: naming the file and the line, if they are none.
    """
    entries = []
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                grid, codes = entry["grid"], entry["codes"]
                height, width = grid
                are_integers = all(type(value) is int and 0 <= value < 2**31 for value in (height, width, *codes))
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ValueError(f"{path}, line {number} must hold `grid` and `codes`.") from error
            if not are_integers or min(height, width) < 1 or len(codes) != height * width:
                raise ValueError(f"{path}, line {number}: `codes` must be {height} x {width} integers.")
            entries.append(entry)
    if not entries:
        raise ValueError(f"{path} holds no codes.")
    return entries


def decode_codes(
    pipe: "LLaDAUniPipeline",
    entries: list[dict[str, Any]],
    manifest: "Manifest",
    seed: int,
    num_inference_steps: int | None = None,
    upscale: int = 2,
) -> Iterator[tuple[dict[str, Any], bool]]:
    """
    The manifest's entry of each image, and whether it is new.

    Args:
        pipe: The pipeline.
        entries: Of [`read_codes`].
        manifest: Takes the images.
        seed: Of the decoder's noise.
        num_inference_steps, upscale: Of the decoder.
    """
    import torch

    from diffusers_llada_uni.evaluation.image_making import describe_pipeline

    settings: dict[str, Any] = {"num_inference_steps": num_inference_steps}
    if upscale != 2:  # what a run before made without it is found again
        settings["upscale"] = upscale
    grids = [torch.tensor(entry["codes"]).view(1, *entry["grid"]) for entry in entries]
    decoder = pipe.code_decoder
    for number, codes in enumerate(grids, 1):
        try:
            decoder.check_codes(codes)
        except ValueError as error:
            raise ValueError(f"Image {number}: {error}") from error
    described = describe_pipeline(pipe, settings)
    asked = [
        {
            "prompt": Path(str(entry.get("image", "codes"))).stem,
            "codes": entry["codes"],
            "grid": entry["grid"],
            "seed": seed,
            **described,
        }
        for entry in entries
    ]

    def make(numbers: list[int]) -> "list[PIL.Image.Image]":
        (number,) = numbers  # grids may differ
        generator = torch.Generator().manual_seed(seed)
        images = pipe.decode_codes(grids[number], **settings, generator=generator)
        return cast("list[PIL.Image.Image]", images)

    for _, entry, is_new in manifest.complete(asked, make):
        yield entry, is_new
