"""Images of requests (to draw, to edit, to fill in), kept on the disk as they are made."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from PIL import ImageOps

from transformers_llada_uni.fingerprints import fingerprint

from ..pipeline_llada_uni import LLaDAUniPipeline
from .manifest import Entry, Manifest


Pipeline = Callable[..., Any]
# Of each tensor of a pipeline, to tell it from others; all of them would take a minute for the released one.
VALUES_PER_TENSOR = 64


@dataclass(frozen=True)
class Request:
    """
    Attributes:
        prompt: Text.
        images: Paths of its images: the source of an edit, then references.
        mask: Path of its mask.
        seed: Of its randomness; `None` where that of the run holds.
    """

    prompt: str
    images: tuple[str, ...] = ()
    mask: str | None = None
    seed: int | None = None


def make_images(
    pipeline: Pipeline,
    requests: Sequence[Request],
    manifest: Manifest,
    *,
    seed: int = 0,
    num_images: int = 1,
    batch_size: int = 1,
    **pipeline_kwargs: Any,
) -> Iterator[tuple[int, Entry, bool]]:
    """
    Makes what a manifest does not hold yet; see [`Manifest.complete`].

    Args:
        pipeline: [`LLaDAUniPipeline`], or any callable that takes `prompt` (list of str), `generator` (list of
            `torch.Generator`), for requests with images `image` (a list of images for each prompt) and `mask_image`,
            and gives PIL images, as a list or as its result's `.images`.
        requests: All to draw, all to edit, or all to fill in.
        manifest: Takes the images.
        seed: Of requests that have none. Image j of a request is made with the seed `seed + j`.
        num_images: Of each request. Several are sampled, as by the pipeline's `num_images_per_prompt`; of another
            callable that is its own affair.
        batch_size: Images made at once.
        **pipeline_kwargs: For `pipeline`.

    Yields:
        For each image its number (those of a request stand together), its entry, and whether it is new.
    """
    if num_images > 1 and isinstance(pipeline, LLaDAUniPipeline):
        given = pipeline_kwargs.get("generation_kwargs") or {}
        pipeline_kwargs["generation_kwargs"] = {"do_sample": True, **given}
    described = describe_pipeline(pipeline, pipeline_kwargs)
    asked, of_request = [], []
    for request in requests:
        sources = _digests(request)
        for number in range(num_images):
            image_seed = (seed if request.seed is None else request.seed) + number
            asked.append({"prompt": request.prompt, "seed": image_seed, **described, **sources})
            of_request.append(request)

    def make(numbers: list[int]) -> list[PIL.Image.Image]:
        batch = [of_request[number] for number in numbers]
        sources: dict[str, Any] = {}
        if batch[0].images:
            sources["image"] = [[_open(path) for path in request.images] for request in batch]
        if batch[0].mask is not None:
            sources["mask_image"] = [_open(request.mask or "") for request in batch]
        made = pipeline(
            prompt=[request.prompt for request in batch],
            generator=[torch.Generator().manual_seed(asked[number]["seed"]) for number in numbers],
            **sources,
            **pipeline_kwargs,
        )
        images = list(made.images if hasattr(made, "images") else made)
        if len(images) != len(batch):
            raise ValueError(f"`pipeline` gave {len(images)} images for {len(batch)} prompts.")
        return images

    return manifest.complete(asked, make, batch_size)


def describe_pipeline(pipeline: Pipeline, settings: dict[str, Any]) -> Entry:
    """The part of a request that says which pipeline makes it, and how."""
    return {
        "model": str(getattr(pipeline, "name_or_path", type(pipeline).__name__)),
        "model_fingerprint": fingerprint(pipeline, VALUES_PER_TENSOR)[:24],
        "settings": {name: _plain(value) for name, value in settings.items()},
    }


def _open(path: str) -> PIL.Image.Image:
    """Upright, as its camera says."""
    with PIL.Image.open(path) as image:
        return ImageOps.exif_transpose(image)


def opened(value: Any) -> Any:
    """With the image in the place of each path: what is made of it follows from what the file holds now."""
    if isinstance(value, list | tuple):
        return [opened(entry) for entry in value]
    return _open(str(value)) if isinstance(value, str | os.PathLike) and os.path.isfile(value) else value


def _digests(request: Request) -> Entry:
    """What an image follows from is what a file holds, whatever it held in a run before."""
    digests: Entry = {}
    if request.images:
        digests |= {"images": list(request.images), "images_sha256": [_sha256(path) for path in request.images]}
    if request.mask is not None:
        digests |= {"mask": request.mask, "mask_sha256": _sha256(request.mask)}
    return digests


def _sha256(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _plain(value: Any) -> Any:
    """A setting as JSON gives it back, so that people can read it; of what JSON cannot hold the fingerprint."""
    try:
        return json.loads(json.dumps(value))
    except TypeError:
        return fingerprint(value)
