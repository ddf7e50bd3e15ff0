"""`draw`, `edit` and `fill`: prompts to files."""

import hashlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import PIL.Image
import torch
from PIL import ImageOps

from .manifest import Manifest
from .requests import Request


if TYPE_CHECKING:
    from diffusers_llada_uni import LLaDAUniPipeline


def open_image(path: str, name: str = "image") -> PIL.Image.Image:
    """
    An image, turned upright as its camera says.

    Raises:
        ValueError: naming the file, if it is no image.
    """
    try:
        with PIL.Image.open(path) as image:
            return ImageOps.exif_transpose(image)
    except FileNotFoundError as error:
        raise ValueError(f"`{name}`: there is no file {path}.") from error
    except Exception as error:  # PIL raises whatever its decoders raise
        raise ValueError(f"`{name}`: {path} is no image that can be read: {error}") from error


def make_images(
    pipe: "LLaDAUniPipeline",
    model_name: str,
    requests: list[Request],
    manifest: Manifest,
    settings: dict[str, Any],
    seed: int = 0,
    num_images: int = 1,
    batch_size: int = 8,
    on_entry: Callable[[dict[str, Any], bool], None] = lambda entry, is_new: None,
) -> None:
    """
    Makes what the manifest does not hold yet.

    Args:
        pipe: The pipeline.
        model_name: Part of what a result follows from.
        requests: What to draw, to edit or to fill in; all of one kind.
        manifest: Takes the results.
        settings: Of the pipeline's call.
        seed: Of requests that have none; the images of one prompt have it and those after it.
        num_images: Of each request.
        batch_size: Images made at once.
        on_entry: Called with each entry, and whether it is new.
    """
    wanted = []
    for request, image_seed in _with_seeds(requests, seed, num_images):
        asked = {"prompt": request.prompt, "seed": image_seed, "model": model_name, "settings": settings}
        if request.images:
            asked["images"] = [_fingerprint(path) for path in request.images]
        if request.mask is not None:
            asked["mask"] = _fingerprint(request.mask)
        entry = manifest.find(asked)
        if entry is not None:
            on_entry(entry, False)
        else:
            wanted.append((request, image_seed, asked))
    for first in range(0, len(wanted), batch_size):
        batch = wanted[first : first + batch_size]
        sources: dict[str, Any] = {}
        if batch[0][0].images:
            sources["image"] = [[open_image(path) for path in request.images] for request, _, _ in batch]
        if batch[0][0].mask is not None:
            sources["mask_image"] = [open_image(request.mask or "", "mask") for request, _, _ in batch]
        generators = [torch.Generator().manual_seed(image_seed) for _, image_seed, _ in batch]
        began = time.perf_counter()
        prompts = [request.prompt for request, _, _ in batch]
        images = pipe(prompts, generator=generators, **sources, **settings).images
        seconds = (time.perf_counter() - began) / len(batch)
        for (_, _, asked), image in zip(batch, images, strict=True):
            on_entry(manifest.add(asked, image, seconds), True)


def _fingerprint(path: str) -> dict[str, str]:
    """What an image follows from is what a file holds, whatever it held in a run before."""
    return {"file": path, "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest()}


def _with_seeds(requests: list[Request], seed: int, num_images: int) -> Iterator[tuple[Request, int]]:
    for request in requests:
        first = seed if request.seed is None else request.seed
        for index in range(num_images):
            yield request, first + index
