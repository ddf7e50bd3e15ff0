"""Text-to-image evaluation: pictures of a list of prompts, kept on the disk as they are made, and their scores."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm


Pipeline = Callable[..., Any]
SETTINGS_FILE, RESULTS_FILE = "settings.json", "results.json"


class PictureFolder(Sequence):
    """Pictures on the disk, opened when they are looked at."""

    def __init__(self, paths: Sequence[Path]):
        self.paths = list(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [_open(path) for path in self.paths[index]]
        return _open(self.paths[index])


def generate_pictures(
    pipeline: Pipeline,
    prompts: Sequence[str],
    output_dir: str | os.PathLike,
    *,
    num_images_per_prompt: int = 1,
    seed: int = 0,
    batch_size: int = 1,
    show_progress_bar: bool = True,
    **pipeline_kwargs: Any,
) -> PictureFolder:
    r"""
    Makes pictures of prompts, or goes on where an earlier run of the same settings was stopped.

    Picture j of prompt i is `output_dir/<i>-<j>.png`. Its noise depends on `seed`, i and j: not on the batch, nor on
    where a run was stopped. A picture is written under another name and then renamed, so a file is a whole picture.

    Args:
        pipeline: [`LLaDAUniPipeline`], or any callable that takes `prompt` (list of str) and `generator` (list of
            `torch.Generator`) and gives PIL pictures, as a list or as its result's `.images`.
        prompts (`Sequence[str]`): What to draw.
        output_dir (`str` or `os.PathLike`): Is made if there is none.
        num_images_per_prompt (`int`, defaults to 1): Pictures of each prompt.
        seed (`int`, defaults to 0): Of all noise.
        batch_size (`int`, defaults to 1): Pictures in one call of `pipeline`.
        show_progress_bar (`bool`, defaults to `True`): Show a bar that counts pictures. A pipeline's own bars are
            best turned off: `pipeline.set_progress_bar_config(disable=True)`.
        **pipeline_kwargs: For `pipeline`, such as `height`, `width`, `guidance_scale`.

    Returns:
        The pictures, a sequence of `len(prompts) * num_images_per_prompt`; those of one prompt stand together.

    Raises:
        ValueError: if `prompts` is empty or holds what is no text; for a number below its least value; if `output_dir`
            holds the pictures of other prompts or settings; if `pipeline` gives another number of pictures than asked.
    """
    if not callable(pipeline):
        raise TypeError(f"`pipeline` must be callable, got {type(pipeline).__name__}.")
    prompts = _check_prompts(prompts)
    for name, value, minimum in (
        ("num_images_per_prompt", num_images_per_prompt, 1),
        ("seed", seed, 0),
        ("batch_size", batch_size, 1),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise ValueError(f"`{name}` must be an integer of at least {minimum}, got {value!r}.")
    for name in ("prompt", "generator", "output_type", "return_dict"):
        if name in pipeline_kwargs:
            raise ValueError(f"`{name}` is set for every picture and cannot be given.")
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    _keep_settings(
        folder / SETTINGS_FILE,
        {
            "prompts": prompts,
            "num_images_per_prompt": num_images_per_prompt,
            "seed": seed,
            "pipeline_kwargs": {name: _plain(value) for name, value in sorted(pipeline_kwargs.items())},
        },
    )

    numbers = [(prompt, picture) for prompt in range(len(prompts)) for picture in range(num_images_per_prompt)]
    paths = [folder / f"{prompt:05d}-{picture:02d}.png" for prompt, picture in numbers]
    missing = [index for index, path in enumerate(paths) if not path.exists()]
    done = len(paths) - len(missing)
    with tqdm(total=len(paths), initial=done, unit="picture", disable=not show_progress_bar) as progress:
        for start in range(0, len(missing), batch_size):
            batch = missing[start : start + batch_size]
            made = pipeline(
                prompt=[prompts[numbers[index][0]] for index in batch],
                generator=[_generator(seed, *numbers[index]) for index in batch],
                **pipeline_kwargs,
            )
            pictures = list(getattr(made, "images", made))
            if len(pictures) != len(batch):
                raise ValueError(f"`pipeline` gave {len(pictures)} pictures for {len(batch)} prompts.")
            for index, picture in zip(batch, pictures, strict=True):
                temporary = paths[index].with_suffix(".tmp")
                picture.save(temporary, format="PNG")
                os.replace(temporary, paths[index])
            progress.update(len(batch))
    return PictureFolder(paths)


def score_pictures(
    metric: Any, prompts: Sequence[str], pictures: Sequence[Image.Image], *, batch_size: int = 16
) -> dict[str, Any]:
    """
    Scores pictures, each with its prompt.

    Args:
        metric: A callable `(prompts, pictures) -> one number per picture`, such as [`CLIPScore`], or a metric of
            `evaluate`, which gets the pictures as predictions and the prompts as references.
        prompts (`Sequence[str]`): One for each picture.
        pictures (`Sequence[PIL.Image.Image]`): The pictures.
        batch_size (`int`, defaults to 16): Pictures given to `metric` at a time.

    Returns:
        Of a callable `mean` (`float`) and `scores` (`list[float]`); of a metric of `evaluate` what it computes.

    Raises:
        ValueError: if there are no pictures or not as many as prompts, or `metric` gives another number of scores.
    """
    if len(prompts) != len(pictures) or len(pictures) == 0:
        raise ValueError(f"`prompts` and `pictures` must be as many, got {len(prompts)} and {len(pictures)}.")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"`batch_size` must be an integer of at least 1, got {batch_size!r}.")
    batches = (  # one at a time: the pictures may be on the disk
        (list(prompts[start : start + batch_size]), list(pictures[start : start + batch_size]))
        for start in range(0, len(pictures), batch_size)
    )
    if hasattr(metric, "add_batch") and hasattr(metric, "compute"):
        for some_prompts, some_pictures in batches:
            metric.add_batch(predictions=some_pictures, references=some_prompts)
        return metric.compute()
    if not callable(metric):
        raise TypeError(f"`metric` must be callable or a metric of `evaluate`, got {type(metric).__name__}.")
    scores: list[float] = []
    for some_prompts, some_pictures in batches:
        given = [float(score) for score in metric(some_prompts, some_pictures)]
        if len(given) != len(some_pictures):
            raise ValueError(f"`metric` gave {len(given)} scores for {len(some_pictures)} pictures.")
        scores += given
    return {"mean": sum(scores) / len(scores), "scores": scores}


def evaluate_text_to_image(
    pipeline: Pipeline,
    prompts: Sequence[str],
    output_dir: str | os.PathLike,
    metrics: Mapping[str, Any],
    *,
    reference_pictures: Sequence[Image.Image] | None = None,
    distances: Mapping[str, Callable[[Sequence[Image.Image], Sequence[Image.Image]], float]] | None = None,
    num_images_per_prompt: int = 1,
    metric_batch_size: int = 16,
    **generate_kwargs: Any,
) -> dict[str, Any]:
    r"""
    Makes the pictures of prompts and scores them.

    Args:
        pipeline, prompts, output_dir, num_images_per_prompt, **generate_kwargs: See [`generate_pictures`].
        metrics (`Mapping[str, Any]`): By name, metrics of a prompt and its picture; see [`score_pictures`].
        reference_pictures (`Sequence[PIL.Image.Image]`, *optional*): What `distances` compare with.
        distances (`Mapping[str, Callable]`, *optional*): By name, callables from all pictures and all reference
            pictures to a number, such as [`FrechetDistance`].
        metric_batch_size (`int`, defaults to 16): Pictures given to a metric at a time.

    Returns:
        By name what the metrics and distances gave; also written to `output_dir/results.json`.

    Raises:
        ValueError: as in [`generate_pictures`] and [`score_pictures`]; if `distances` and `reference_pictures` are not
            given together, or a name is in both mappings.
    """
    distances = {} if distances is None else distances
    if bool(distances) != (reference_pictures is not None):
        raise ValueError("`distances` and `reference_pictures` go together: give both or neither.")
    if twice := sorted(set(metrics) & set(distances)):
        raise ValueError(f"`metrics` and `distances` both hold {', '.join(twice)}.")
    for name, metric in (*metrics.items(), *distances.items()):
        if not callable(metric) and not hasattr(metric, "compute"):
            raise TypeError(f"The metric `{name}` must be callable or a metric of `evaluate`, got {metric!r}.")
    pictures = generate_pictures(
        pipeline, prompts, output_dir, num_images_per_prompt=num_images_per_prompt, **generate_kwargs
    )
    of_each = [prompt for prompt in prompts for _ in range(num_images_per_prompt)]
    results = {
        name: score_pictures(metric, of_each, pictures, batch_size=metric_batch_size)
        for name, metric in metrics.items()
    }
    results |= {name: float(distance(pictures, reference_pictures)) for name, distance in distances.items()}
    _write(Path(output_dir) / RESULTS_FILE, results)
    return results


def _check_prompts(prompts: Any) -> list[str]:
    if isinstance(prompts, str) or not isinstance(prompts, Sequence) or len(prompts) == 0:
        raise ValueError(f"`prompts` must be a list of at least one text, got {prompts!r}.")
    for number, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"`prompts` must hold texts, got {prompt!r} in row {number}.")
    return list(prompts)


def _generator(seed: int, prompt: int, picture: int) -> torch.Generator:
    state = np.random.SeedSequence([seed, prompt, picture]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)


def _keep_settings(path: Path, settings: dict[str, Any]) -> None:
    """Writes the settings of a new run; refuses to go on with another run's pictures."""
    if not path.exists():
        if any(path.parent.glob("*.png")):
            raise ValueError(f"`output_dir` {path.parent} holds pictures, but no {path.name} that says what of.")
        _write(path, settings)
        return
    kept = json.loads(path.read_text())
    different = [name for name in settings if kept.get(name) != settings[name]]
    if different:
        raise ValueError(
            f"`output_dir` {path.parent} holds pictures of another run: its {', '.join(different)} differ. Give "
            "another folder, or remove that one."
        )


def _plain(value: Any) -> Any:
    """What JSON can hold of a setting, as JSON gives it back; of other objects their class."""
    try:
        return json.loads(json.dumps(value))
    except TypeError:
        return type(value).__name__


def _write(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, path)


def _open(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert("RGB")


__all__ = ["evaluate_text_to_image", "generate_pictures", "score_pictures"]
