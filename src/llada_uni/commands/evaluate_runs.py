"""What `evaluate` runs: images, answers, likelihoods and tasks, each scored; a run that is stopped goes on."""

import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import PIL.Image
from tqdm.auto import tqdm

from diffusers_llada_uni.evaluation.image_making import describe_pipeline
from diffusers_llada_uni.evaluation.manifest import Manifest
from diffusers_llada_uni.evaluation.text_to_image import evaluate_text_to_image, write_results
from transformers_llada_uni.fingerprints import fingerprint
from transformers_llada_uni.optional_dependencies import require_extra

from ..image_files import SUFFIXES, open_image
from .user_functions import user_function


if TYPE_CHECKING:
    from diffusers_llada_uni import LLaDAUniPipeline

    from ..answers import ChatModel


class ReferenceImages(Sequence[PIL.Image.Image]):
    """The images of a folder, opened when they are looked at."""

    def __init__(self, folder: str):
        self.paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in SUFFIXES)
        if not self.paths:
            raise ValueError(f"`reference`: there are no images in {folder}.")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [open_image(str(path)) for path in self.paths[index]]
        return open_image(str(self.paths[index]))


def image_metrics(
    clip: str | None, features: str | None, functions: Sequence[str], device: str | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    The metrics of prompts and their images, and the distances between sets of images, by name.

    Args:
        clip: A CLIP model, a folder or a name.
        features: A model of images, for the Frechet distance.
        functions: Paths `module.function`.
        device: Of the models.

    Raises:
        ValueError: for a function or a model that cannot be had, or two of one name; names the option.
    """
    from diffusers_llada_uni.evaluation.image_metrics import CLIPScore, FrechetDistance, ImageFeatures

    names = [path.rpartition(".")[2] for path in functions]
    of_results = ["images"] + ["clip_score"] * (clip is not None) + ["frechet_distance"] * (features is not None)
    for name, path in zip(names, functions, strict=True):
        if (names + of_results).count(name) > 1:
            raise ValueError(f"`metric` {path!r}: there is another score of the name {name!r}; rename the function.")
    metrics: dict[str, Any] = {
        name: user_function(path, "metric") for name, path in zip(names, functions, strict=True)
    }
    if clip is not None:
        metrics["clip_score"] = _model_of("clip", CLIPScore, clip, device)
    if features is None:
        return metrics, {}
    return metrics, {"frechet_distance": FrechetDistance(_model_of("features", ImageFeatures, features, device))}


def _model_of(option: str, kind: Callable[..., Any], name: str, device: str | None) -> Any:
    try:
        return kind(name, device=device)
    except OSError as error:
        raise ValueError(f"`{option}` {name!r} cannot be loaded: {error}") from error
    except ValueError as error:
        raise ValueError(str(error).replace("`model`", f"`{option}`")) from error


def evaluate_images(
    pipe: "LLaDAUniPipeline",
    prompts: list[str],
    output: Path,
    metrics: dict[str, Any],
    distances: dict[str, Any],
    reference: ReferenceImages | None,
    **settings: Any,
) -> dict[str, Any]:
    """Images of prompts and their scores; see [`evaluate_text_to_image`], which takes the settings."""
    scores = evaluate_text_to_image(
        pipe,
        prompts,
        output,
        metrics,
        distances=distances or None,
        reference_images=reference,
        show_progress_bar=sys.stderr.isatty(),
        **settings,
    )
    return scores | {"images": len(prompts) * settings["num_images_per_prompt"]}


def load_rows(data: str, split: str, limit: int | None) -> Any:
    """
    The rows of a dataset: a file, a folder, or a name on the Hub.

    Raises:
        ValueError, OSError: if it cannot be read, or has no such split or no rows.
    """
    require_extra("evaluation", "datasets", "evaluate", "trl")
    import datasets

    from transformers_llada_uni.training.data.dataset_loading import load_training_dataset, split_of

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        rows = split_of(load_training_dataset(data), split, "split")
    except datasets.exceptions.DatasetNotFoundError as error:
        raise ValueError(f"`data` {data!r} is no file or folder here, and no dataset of the Hub.") from error
    except (OSError, ValueError) as error:
        raise ValueError(str(error).replace("`dataset_name`", "`data`")) from error
    rows = rows if limit is None else rows.select(range(min(limit, len(rows))))
    if not len(rows):
        raise ValueError(f"`data` {data!r} has no rows.")
    return rows


def folder_of(data: str) -> Path:
    """Where paths in the data are seen from: its folder, of a pattern the part without one; else the working one."""
    from transformers_llada_uni.training.data.dataset_loading import folder_and_pattern

    path = Path(data).expanduser()
    folder, pattern = folder_and_pattern(path)
    return Path(folder) if pattern is not None or path.is_dir() else Path()


def _listed(answers: Any) -> list[str] | None:
    """
    Answers as texts, `None` if they are none. A table's cell has room for one text: several answers stand there as a
    list in JSON.
    """
    from transformers_llada_uni.evaluation.visual_question_answering import answers_of

    if isinstance(answers, str) and answers.strip().startswith("[") and answers.strip().endswith("]"):
        try:
            answers = json.loads(answers)
        except ValueError:
            return None
    return answers_of(answers)


class ImageQuestions(Sequence[dict[str, Any]]):
    """
    The rows of visual question answering; see [`evaluate_visual_question_answering`]. All are looked at to begin with,
    and their images opened again when they are asked about.

    Args:
        rows: With `image`, `question` and `answers`: a text or a number, or several, in a table as a list in JSON.
        folder: Where paths of images are seen from.
        instruction: A line after each question; empty for none.

    Raises:
        ValueError, OSError: for a row that lacks something, and for an image that cannot be read.
    """

    def __init__(self, rows: Any, folder: Path, instruction: str):
        self.rows, self.folder, self.instruction = rows, folder, instruction
        self.entries = [
            {"prompt": row["question"], "answers": row["answers"], "image_fingerprint": fingerprint(row["image"])}
            for row in self
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        row = self.rows[index]
        for name in ("image", "question", "answers"):
            if row.get(name) is None or row[name] == "" or row[name] == []:
                raise ValueError(f"`data`, row {index + 1} has no `{name}`.")
        answers = _listed(row["answers"])
        if not answers:
            raise ValueError(
                f"`data`, row {index + 1}: `answers` must be a text or a number, or a list of them (in a table in "
                f'JSON, as ["two", "2"]), got {row["answers"]!r:.80}.'
            )
        images = row["image"] if isinstance(row["image"], list) else [row["image"]]
        asked = f"{row['question']}\n{self.instruction}" if self.instruction else row["question"]
        return row | {"image": [*map(self._opened, images)], "question": asked, "answers": answers}

    def _opened(self, image: Any) -> PIL.Image.Image:
        from transformers_llada_uni.training.data.dataset_formats import stored_image

        return open_image(str(self.folder / image)) if isinstance(image, str) else stored_image(image)


def evaluate_questions(
    pipe: "LLaDAUniPipeline", questions: ImageQuestions, output: Path, batch_size: int, max_new_tokens: int
) -> dict[str, Any]:
    """
    Visual question answering: `accuracy`, and `questions`, how many there were.

    Args:
        pipe: The pipeline.
        questions: And what people answered.
        output: The folder for the answers.
        batch_size: Questions answered at once.
        max_new_tokens: Of an answer.
    """
    from transformers_llada_uni.evaluation import evaluate_visual_question_answering

    described = describe_pipeline(pipe, {"max_new_tokens": max_new_tokens})
    asked = [entry | described for entry in questions.entries]

    def make(numbers: list[int]) -> list[dict[str, Any]]:
        answers = evaluate_visual_question_answering(
            pipe.model,
            pipe.processor,
            [questions[number] for number in numbers],
            batch_size=len(numbers),
            prompt_template="{question}",
            max_new_tokens=max_new_tokens,
            show_progress_bar=False,
        )
        pairs = zip(answers["predictions"], answers["accuracies"], strict=True)
        return [{"answer": answer, "accuracy": accuracy} for answer, accuracy in pairs]

    entries = _complete(Manifest(output), asked, make, batch_size, "question")
    return {"accuracy": sum(entry["accuracy"] for entry in entries) / len(entries), "questions": len(entries)}


def evaluate_likelihood(
    pipe: "LLaDAUniPipeline",
    rows: Any,
    output: Path,
    num_samples: int,
    block_length: int | None,
    seed: int,
    batch_size: int,
) -> dict[str, Any]:
    """
    The bound on the likelihood of what training would learn from the rows: answers, completions, captions' images.

    Args:
        pipe: The pipeline.
        rows: Of a format of training; see [`prepare_dataset`].
        output: The folder for the likelihoods.
        num_samples, block_length, seed, batch_size: Of [`completion_likelihood`].

    Returns:
        `perplexity` and `log_likelihood` of a token (nats), `tokens`, `completions`.
    """
    import torch

    from transformers_llada_uni.evaluation import completion_likelihood
    from transformers_llada_uni.training.data.preparation import prepare_dataset

    model, processor = pipe.code_generator.model, pipe.code_generator.processor
    positions = model.config.get_text_config().max_position_embeddings
    prepared = prepare_dataset(
        rows, processor, block_length=1, max_length=positions, caption_dropout=0, image_dropout=0, model=model
    )
    pairs = [pair for row in prepared for pair in _completions(row["input_ids"], row["labels"])]
    settings: dict[str, Any] = {"num_samples": num_samples, "block_length": block_length, "seed": seed}
    described = describe_pipeline(pipe, settings)
    asked = [
        {
            "completion": processor.tokenizer.decode(ids)[:200],
            "sha256": hashlib.sha256(torch.tensor([len(prompt), *prompt, *ids]).numpy().tobytes()).hexdigest(),
            **described,
        }
        for prompt, ids in pairs
    ]

    def make(numbers: list[int]) -> list[dict[str, Any]]:
        prompts, completions = zip(*(pairs[number] for number in numbers), strict=True)
        bound = completion_likelihood(model, prompts, completions, batch_size=len(numbers), **settings)
        tokens = [len(completion) for completion in completions]
        values = zip(bound.log_likelihoods.tolist(), tokens, strict=True)
        return [{"log_likelihood": value, "tokens": count} for value, count in values]

    entries = _complete(Manifest(output), asked, make, batch_size, "completion")
    num_tokens = sum(entry["tokens"] for entry in entries)
    mean = sum(entry["log_likelihood"] for entry in entries) / num_tokens
    return {
        "perplexity": math.exp(min(-mean, 700.0)),
        "log_likelihood": mean,
        "tokens": num_tokens,
        "completions": len(entries),
    }


def _completions(input_ids: list[int], labels: list[int]) -> list[tuple[list[int], list[int]]]:
    """What is learnt of a row, each part with all that stands before it."""
    pairs, start = [], 0
    while start < len(labels):
        end = start
        while end < len(labels) and (labels[end] == -100) == (labels[start] == -100):
            end += 1
        if labels[start] != -100:
            pairs.append((input_ids[:start], input_ids[start:end]))
        start = end
    return pairs


def evaluate_tasks(
    load: Callable[[], "str | ChatModel"],
    device: str,
    dtype: str,
    tasks: list[str],
    output: Path,
    include_path: str | None,
    limit: int | None,
    num_fewshot: int | None,
    num_samples: int,
    seed: int,
    batch_size: int,
) -> dict[str, Any]:
    """
    Tasks of lm-eval: by task what lm-eval computes.

    Args:
        load: Gives a folder or a repository of the Hub, or a model; called when all else has been looked at.
        device, dtype: Of the model.
        tasks: Names.
        output: The folder for results; answers are kept in it as they come.
        include_path: A folder with further tasks, as YAML.
        limit: Rows of each task.
        num_fewshot: Examples before each question. Default: the task's.
        num_samples, seed: Of the likelihood's bound.
        batch_size: Rows at once.
    """
    require_extra("evaluation", "lm_eval", "datasets", "evaluate", "trl")
    import lm_eval
    from lm_eval.tasks import TaskManager

    from transformers_llada_uni.evaluation.lm_eval_model import LLaDAUniLM

    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(f"`include_path` {include_path!r} is no folder.")
    # lm-eval's own tasks are read for half a minute; who names tasks of his own need not wait for it.
    manager = TaskManager(include_path=include_path, include_defaults=False)
    if not set(tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=include_path)
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise ValueError(f"`tasks`: lm-eval knows no {', '.join(unknown)}.")
    Manifest(output)  # a folder that can be written
    settings: dict[str, Any] = {"num_samples": num_samples, "seed": seed}
    model = load()
    given: dict[str, Any] = {"pretrained": model}
    if not isinstance(model, str):
        given = {"pretrained": model.model, "tokenizer": model.processor}
    harness = LLaDAUniLM(**given, device=device, dtype=dtype, batch_size=batch_size, **settings)
    answers = output / f"answers-{fingerprint([harness.model, settings, num_fewshot], 64)[:12]}"
    results = lm_eval.simple_evaluate(
        model=harness,
        tasks=tasks,
        task_manager=manager,
        limit=limit,
        num_fewshot=num_fewshot,
        use_cache=str(answers),
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
        log_samples=False,
        bootstrap_iters=1000,
    )
    assert results is not None  # only of processes other than the first
    return {
        task: {name: value for name, value in scores.items() if isinstance(value, int | float)}
        for task, scores in results["results"].items()
    }


def _complete(manifest: Manifest, asked: list[dict[str, Any]], make: Any, batch_size: int, unit: str) -> list[Any]:
    entries: list[Any] = [None] * len(asked)
    with tqdm(total=len(asked), unit=unit, disable=not sys.stderr.isatty()) as progress:
        for number, entry, _ in manifest.complete(asked, make, batch_size):
            entries[number] = entry
            progress.update()
    return entries


def report(results: dict[str, Any], output: Path, described: dict[str, Any]) -> dict[str, Any]:
    """Writes `results.json`, with what they are results of; returns them."""
    results = {**described, "results": results}
    write_results(output, results)
    return results


def table_of(results: dict[str, Any]) -> list[str]:
    """Lines of names and numbers; of scores of many images the mean."""
    numbers = list(_numbers(results))
    width = max((len(name) for name, _ in numbers), default=0)
    return [f"{name:{width}}  {value:{'.4f' if isinstance(value, float) else 'd'}}" for name, value in numbers]


def _numbers(results: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, int | float]]:
    for name, value in results.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{name} ")
        elif isinstance(value, int | float):
            yield f"{prefix}{name}", value
