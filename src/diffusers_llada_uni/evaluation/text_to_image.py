"""Text-to-image evaluation: pictures of a list of prompts, kept on the disk as they are made, and their scores."""

import contextlib
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from PIL import Image
from tqdm.auto import tqdm

from transformers_llada_uni.fingerprints import fingerprint
from transformers_llada_uni.input_checks import check_integer
from transformers_llada_uni.seeding import seeded_generator


Pipeline = Callable[..., Any]
SETTINGS_FILE, RESULTS_FILE = "settings.json", "results.json"
# Of a file that is being written; a picture takes far less to write than the seconds after which it is taken for dead.
PARTIAL_SUFFIX, SECONDS_TO_WRITE = ".partial", 600


class PictureFolder(Sequence[Image.Image]):
    """Pictures on the disk, opened when they are looked at."""

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


def generate_pictures(
    pipeline: Pipeline,
    prompts: Sequence[str],
    output_dir: str | os.PathLike[str],
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
    Several processes may work on one folder; what another has made meanwhile is not made again.

    `output_dir/settings.json` says what the pictures were made with: prompts, settings, and the [`fingerprint`] of the
    pipeline (all its weights and configurations) and of what is no plain value, such as an image.

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
        ValueError, TypeError: if `prompts` is empty or holds what is no text; for a number below its least value; if
            `output_dir` holds the pictures of other prompts, settings or weights; if `pipeline` gives another number
            of pictures than asked.
    """
    if not callable(pipeline):
        raise TypeError(f"`pipeline` must be callable, got {type(pipeline).__name__}.")
    prompts = _check_prompts(prompts)
    check_integer("num_images_per_prompt", num_images_per_prompt, 1)
    check_integer("seed", seed, 0)
    check_integer("batch_size", batch_size, 1)
    for name in ("prompt", "generator", "output_type", "return_dict"):
        if name in pipeline_kwargs:
            raise ValueError(f"`{name}` is set for every picture and cannot be given.")
    folder = Path(output_dir)
    settings = {
        "prompts": prompts,
        "num_images_per_prompt": num_images_per_prompt,
        "seed": seed,
        "pipeline": fingerprint(pipeline),
        "pipeline_kwargs": {name: _comparable(value) for name, value in sorted(pipeline_kwargs.items())},
    }
    folder.mkdir(parents=True, exist_ok=True)
    _keep_settings(folder / SETTINGS_FILE, settings)
    _remove_leftovers(folder)

    numbers = [(prompt, picture) for prompt in range(len(prompts)) for picture in range(num_images_per_prompt)]
    paths = [folder / f"{prompt:05d}-{picture:02d}.png" for prompt, picture in numbers]
    missing = [index for index, path in enumerate(paths) if not path.exists()]
    with tqdm(
        total=len(paths), initial=len(paths) - len(missing), unit="picture", disable=not show_progress_bar
    ) as progress:
        for start in range(0, len(missing), batch_size):
            batch = [index for index in missing[start : start + batch_size] if not paths[index].exists()]
            if batch:
                made = pipeline(
                    prompt=[prompts[numbers[index][0]] for index in batch],
                    generator=[seeded_generator(seed, *numbers[index]) for index in batch],
                    **pipeline_kwargs,
                )
                pictures: list[Image.Image] = list(made.images if hasattr(made, "images") else made)
                if len(pictures) != len(batch):
                    raise ValueError(f"`pipeline` gave {len(pictures)} pictures for {len(batch)} prompts.")
                for index, picture in zip(batch, pictures, strict=True):
                    with _whole_file(paths[index]) as temporary:
                        picture.save(temporary, format="PNG")
            progress.update(len(missing[start : start + batch_size]))
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
    check_integer("batch_size", batch_size, 1)
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
    output_dir: str | os.PathLike[str],
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
    check_integer("metric_batch_size", metric_batch_size, 1)
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
    results: dict[str, Any] = {
        name: score_pictures(metric, of_each, pictures, batch_size=metric_batch_size)
        for name, metric in metrics.items()
    }
    for name, distance in distances.items():
        results[name] = float(distance(pictures, reference_pictures or []))
    _write(Path(output_dir) / RESULTS_FILE, results)
    return results


def _check_prompts(prompts: Any) -> list[str]:
    if isinstance(prompts, str) or not isinstance(prompts, Sequence) or len(prompts) == 0:
        raise ValueError(f"`prompts` must be a list of at least one text, got {prompts!r}.")
    for number, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"`prompts` must hold texts, got {prompt!r} in row {number}.")
    return list(prompts)


def _keep_settings(path: Path, settings: dict[str, Any]) -> None:
    """Writes the settings of a new run; refuses to go on with another run's pictures."""
    if not path.exists():
        if any(path.parent.glob("*.png")):
            raise ValueError(f"`output_dir` {path.parent} holds pictures, but no {path.name} that says what of.")
        _write(path, settings)
    # Also what was just written is read: another process may have been quicker.
    kept, settings = _flat(json.loads(path.read_text())), _flat(settings)
    different = [name for name in kept | settings if kept.get(name) != settings.get(name)]
    if different:
        raise ValueError(
            f"`output_dir` {path.parent} holds pictures of another run: its {', '.join(different)} differ. Give "
            "another folder, or remove that one."
        )


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    of_pipeline = {f"pipeline_kwargs[{name!r}]": value for name, value in settings.get("pipeline_kwargs", {}).items()}
    return {name: value for name, value in settings.items() if name != "pipeline_kwargs"} | of_pipeline


def _comparable(value: Any) -> Any:
    """A setting as JSON gives it back, so that people can read it; of what JSON cannot hold the fingerprint."""
    try:
        return json.loads(json.dumps(value))
    except TypeError:
        return fingerprint(value)


def _write(path: Path, content: dict[str, Any]) -> None:
    with _whole_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


@contextlib.contextmanager
def _whole_file(path: Path) -> Iterator[Path]:
    """A file of this process alone, which becomes `path` when it is written."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{PARTIAL_SUFFIX}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _remove_leftovers(folder: Path) -> None:
    """Removes what a killed run was writing; not what another process is writing now."""
    for path in folder.glob(f".*{PARTIAL_SUFFIX}"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > SECONDS_TO_WRITE:
                path.unlink()


def _open(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert("RGB")


__all__ = ["evaluate_text_to_image", "generate_pictures", "score_pictures"]
