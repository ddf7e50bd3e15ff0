"""Text-to-image evaluation: images of a list of prompts, kept on the disk as they are made, and their scores."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from PIL import Image
from tqdm.auto import tqdm

from transformers_llada_uni.input_checks import check_integer

from .image_making import Pipeline, Request, make_images, opened
from .manifest import Manifest, whole_file


RESULTS_FILE = "results.json"


class ImageFiles(Sequence[Image.Image]):
    """Images on the disk, opened when they are looked at."""

    def __init__(self, paths: Sequence[Path]):
        self.paths = list(paths)

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> list[Image.Image]: ...
    def __getitem__(self, index: int | slice) -> Image.Image | list[Image.Image]:
        if isinstance(index, slice):
            return [_open(path) for path in self.paths[index]]
        return _open(self.paths[index])


def generate_images(
    pipeline: Pipeline,
    prompts: Sequence[str],
    output_dir: str | os.PathLike[str],
    *,
    num_images_per_prompt: int = 1,
    seed: int = 0,
    batch_size: int = 1,
    show_progress_bar: bool = True,
    **pipeline_kwargs: Any,
) -> ImageFiles:
    r"""
    Makes images of prompts, or goes on where an earlier run was stopped. `llada-uni draw` does the same.

    `output_dir/manifest.jsonl` has a line for each image: prompt, seed, settings, file. What has been made from the
    same prompt, seed and settings by the same pipeline (its configurations, and a sample of its weights) is not made
    again; images of other settings stand beside it. Several processes may work on one folder.

    Image j of a prompt is made with the seed `seed + j`: it depends neither on the batch nor on where a run was
    stopped. Several images of a prompt are sampled, as by the pipeline's `num_images_per_prompt`.

    Args:
        pipeline: [`LLaDAUniPipeline`], or any callable that takes `prompt` (list of str) and `generator` (list of
            `torch.Generator`) and gives PIL images, as a list or as its result's `.images`.
        prompts (`Sequence[str]`): What to draw.
        output_dir (`str` or `os.PathLike`): Is made if there is none.
        num_images_per_prompt (`int`, defaults to 1): Images of each prompt.
        seed (`int`, defaults to 0): Of all randomness.
        batch_size (`int`, defaults to 1): Images in one call of `pipeline`.
        show_progress_bar (`bool`, defaults to `True`): Show a bar that counts images. A pipeline's own bars are
            best turned off: `pipeline.set_progress_bar_config(disable=True)`.
        **pipeline_kwargs: For `pipeline`, such as `height`, `width`, `guidance_scale`.

    Returns:
        The images, a sequence of `len(prompts) * num_images_per_prompt`; those of one prompt stand together. Its
        `paths` are their files.

    Raises:
        ValueError, TypeError: if `prompts` is empty or holds what is no text; for a number below its least value; if
            `pipeline` gives another number of images than asked.
    """
    if not callable(pipeline):
        raise TypeError(f"`pipeline` must be callable, got {type(pipeline).__name__}.")
    prompts = _check_prompts(prompts)
    check_integer("num_images_per_prompt", num_images_per_prompt, 1)
    check_integer("seed", seed, 0)
    check_integer("batch_size", batch_size, 1)
    for name in ("prompt", "generator", "output_type", "return_dict"):
        if name in pipeline_kwargs:
            raise ValueError(f"`{name}` is set for every image and cannot be given.")
    for name in {"image", "mask_image"} & set(pipeline_kwargs):
        pipeline_kwargs[name] = opened(pipeline_kwargs[name])
    manifest = Manifest(output_dir)
    paths = [manifest.folder] * (len(prompts) * num_images_per_prompt)
    entries = make_images(
        pipeline,
        [Request(prompt) for prompt in prompts],
        manifest,
        seed=seed,
        num_images=num_images_per_prompt,
        batch_size=batch_size,
        **pipeline_kwargs,
    )
    with tqdm(total=len(paths), unit="image", disable=not show_progress_bar) as progress:
        for number, entry, _ in entries:
            paths[number] = manifest.folder / entry["file"]
            progress.update()
    return ImageFiles(paths)


def score_images(
    metric: Any, prompts: Sequence[str], images: Sequence[Image.Image], *, batch_size: int = 16
) -> dict[str, Any]:
    """
    Scores images, each with its prompt.

    Args:
        metric: A callable `(prompts, images) -> one number per image`, such as [`CLIPScore`], or a metric of
            `evaluate`, which gets the images as predictions and the prompts as references.
        prompts (`Sequence[str]`): One for each image.
        images (`Sequence[PIL.Image.Image]`): The images.
        batch_size (`int`, defaults to 16): Images given to `metric` at a time.

    Returns:
        Of a callable `mean` (`float`) and `scores` (`list[float]`); of a metric of `evaluate` what it computes.

    Raises:
        ValueError: if there are no images or not as many as prompts, or `metric` gives another number of scores.
    """
    if len(prompts) != len(images) or len(images) == 0:
        raise ValueError(f"`prompts` and `images` must be as many, got {len(prompts)} and {len(images)}.")
    check_integer("batch_size", batch_size, 1)
    batches = (  # one at a time: the images may be on the disk
        (list(prompts[start : start + batch_size]), list(images[start : start + batch_size]))
        for start in range(0, len(images), batch_size)
    )
    if hasattr(metric, "add_batch") and hasattr(metric, "compute"):
        for some_prompts, some_images in batches:
            metric.add_batch(predictions=some_images, references=some_prompts)
        return metric.compute()
    if not callable(metric):
        raise TypeError(f"`metric` must be callable or a metric of `evaluate`, got {type(metric).__name__}.")
    scores: list[float] = []
    for some_prompts, some_images in batches:
        given = [float(score) for score in metric(some_prompts, some_images)]
        if len(given) != len(some_images):
            raise ValueError(f"`metric` gave {len(given)} scores for {len(some_images)} images.")
        scores += given
    return {"mean": sum(scores) / len(scores), "scores": scores}


def evaluate_text_to_image(
    pipeline: Pipeline,
    prompts: Sequence[str],
    output_dir: str | os.PathLike[str],
    metrics: Mapping[str, Any],
    *,
    reference_images: Sequence[Image.Image] | None = None,
    distances: Mapping[str, Callable[[Sequence[Image.Image], Sequence[Image.Image]], float]] | None = None,
    num_images_per_prompt: int = 1,
    metric_batch_size: int = 16,
    **generate_kwargs: Any,
) -> dict[str, Any]:
    r"""
    Makes the images of prompts and scores them.

    Args:
        pipeline, prompts, output_dir, num_images_per_prompt, **generate_kwargs: See [`generate_images`].
        metrics (`Mapping[str, Any]`): By name, metrics of a prompt and its image; see [`score_images`].
        reference_images (`Sequence[PIL.Image.Image]`, *optional*): What `distances` compare with.
        distances (`Mapping[str, Callable]`, *optional*): By name, callables from all images and all reference
            images to a number, such as [`FrechetDistance`].
        metric_batch_size (`int`, defaults to 16): Images given to a metric at a time.

    Returns:
        By name what the metrics and distances gave; also written to `output_dir/results.json`.

    Raises:
        ValueError: as in [`generate_images`] and [`score_images`]; if `distances` and `reference_images` are not
            given together, or a name is in both mappings.
    """
    check_integer("metric_batch_size", metric_batch_size, 1)
    distances = {} if distances is None else distances
    if bool(distances) != (reference_images is not None):
        raise ValueError("`distances` and `reference_images` go together: give both or neither.")
    if twice := sorted(set(metrics) & set(distances)):
        raise ValueError(f"`metrics` and `distances` both hold {', '.join(twice)}.")
    for name, metric in (*metrics.items(), *distances.items()):
        if not callable(metric) and not hasattr(metric, "compute"):
            raise TypeError(f"The metric `{name}` must be callable or a metric of `evaluate`, got {metric!r}.")
    images = generate_images(
        pipeline, prompts, output_dir, num_images_per_prompt=num_images_per_prompt, **generate_kwargs
    )
    of_each = [prompt for prompt in prompts for _ in range(num_images_per_prompt)]
    results: dict[str, Any] = {
        name: score_images(metric, of_each, images, batch_size=metric_batch_size) for name, metric in metrics.items()
    }
    for name, distance in distances.items():
        results[name] = float(distance(images, reference_images or []))
    write_results(output_dir, results)
    return results


def _check_prompts(prompts: Any) -> list[str]:
    if isinstance(prompts, str) or not isinstance(prompts, Sequence) or len(prompts) == 0:
        raise ValueError(f"`prompts` must be a list of at least one text, got {prompts!r}.")
    for number, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"`prompts` must hold texts, got {prompt!r} in row {number}.")
    return list(prompts)


def write_results(folder: str | os.PathLike[str], results: Mapping[str, Any]) -> None:
    """Writes `results.json`, whole or not at all."""
    with whole_file(Path(folder) / RESULTS_FILE) as temporary:
        temporary.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _open(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


__all__ = ["evaluate_text_to_image", "generate_images", "score_images"]
