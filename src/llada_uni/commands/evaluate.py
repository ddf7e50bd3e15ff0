"""`evaluate`: how good a model is, by images, answers, likelihoods and tasks of lm-eval."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from .loading import load, load_to_talk
from .options import (
    BatchSize,
    BlockSteps,
    Device,
    Dtype,
    Guidance,
    Model,
    NumImages,
    Seed,
    Size,
    Steps,
    Tokens,
    size_of,
)
from .prompt_files import requests_of


Data = Annotated[str, typer.Argument(help="A file (JSONL, CSV, parquet), a folder, or a dataset of the Hub.")]
Results = Annotated[Path, typer.Option("--output", "-o", help="The folder for results.json and what is made.")]
Split = Annotated[str, typer.Option(help="Of the data; files are all `train`.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first rows.")]
Rows = Annotated[int, typer.Option("--batch-size", min=1, help="Rows at once; changes no result.")]
Samples = Annotated[int, typer.Option("--num-samples", min=1, help="Noisy copies of each text.")]
ResultsAsJson = Annotated[bool, typer.Option("--json", help="results.json on standard output, and no table.")]


def images(
    prompts: Annotated[str, typer.Option("--prompts", "-p", help="A file of prompts, as for `draw`; - is stdin.")],
    output: Results = Path("evaluation/images"),
    model: Model = "emoji",
    clip: Annotated[str | None, typer.Option(help="A CLIP model, for the score of an image and its prompt.")] = None,
    reference: Annotated[
        str | None, typer.Option(help="A folder of images, for the Frechet distance to them.")
    ] = None,
    features: Annotated[str | None, typer.Option(help="The model of images that the distance is measured by.")] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="module.function of your own, (prompts, images) -> numbers; more than once."),
    ] = None,
    size: Size = None,
    num_images: NumImages = 1,
    seed: Seed = 0,
    guidance: Guidance = None,
    steps: Steps = None,
    steps_per_block: BlockSteps = 8,
    batch_size: BatchSize = 8,
    device: Device = None,
    dtype: Dtype = "auto",
    as_json: ResultsAsJson = False,
) -> None:
    """
    Draw the images of a file of prompts, and score them.

    What `draw` has made in the folder is not made again.
    """
    if (reference is None) != (features is None):
        raise ValueError("`--reference` and `--features` go together: give both or neither.")
    if not (clip or features or metric):
        raise ValueError("Give what to score by: `--clip`, `--reference` with `--features`, or `--metric`.")
    settings = {"guidance_scale": guidance, "num_inference_steps": steps, "num_steps_per_block": steps_per_block}
    settings = {name: value for name, value in (size_of(size) | settings).items() if value is not None}
    requests = requests_of("draw", None, prompts)
    if any(request.seed is not None for request in requests):
        raise ValueError(f"{prompts}: `seed` is for `draw`; here `--seed` holds for all.")

    from ..pipeline_loading import resolve_model

    resolve_model(model)  # before torch is imported
    from .evaluate_runs import ReferenceImages, evaluate_images, image_metrics

    plan = {"seed": seed, "num_images_per_prompt": num_images, "batch_size": batch_size}
    reference_images = None if reference is None else ReferenceImages(reference)
    metrics, distances = image_metrics(clip, features, metric or [], device)
    pipe, texts = load(model, device, dtype), [request.prompt for request in requests]
    pipe.set_progress_bar_config(disable=True)  # there is one of all images
    results = evaluate_images(pipe, texts, output, metrics, distances, reference_images, **plan, **settings)
    _report(results, output, as_json, task="images", model=model, **plan, settings=settings)


def questions(
    data: Data,
    output: Results = Path("evaluation/questions"),
    model: Model = "emoji",
    split: Split = "train",
    limit: Limit = None,
    instruction: Annotated[
        str, typer.Option(help="A line after each question, as VQAv2's are asked; '' is none.")
    ] = "Answer the question using a single word or phrase.",
    max_new_tokens: Tokens = 32,
    batch_size: Rows = 8,
    device: Device = None,
    dtype: Dtype = "auto",
    as_json: ResultsAsJson = False,
) -> None:
    """
    Ask about images, and compare with people's answers.

    The accuracy is VQAv2's. Rows have `image` (in the data, or a path seen from its folder), `question` and `answers`,
    a list.
    """
    from ..pipeline_loading import resolve_model

    resolve_model(model)  # before torch is imported
    from .evaluate_runs import ImageQuestions, evaluate_questions, folder_of, load_rows

    rows, folder = load_rows(data, split, limit), folder_of(data)
    asked = ImageQuestions(rows, folder, instruction)
    results = evaluate_questions(load(model, device, dtype), asked, output, batch_size, max_new_tokens)
    settings = {"instruction": instruction, "max_new_tokens": max_new_tokens}
    _report(results, output, as_json, task="questions", model=model, data=data, split=split, **settings)


def likelihood(
    data: Data,
    output: Results = Path("evaluation/likelihood"),
    model: Model = "emoji",
    split: Split = "train",
    limit: Limit = None,
    num_samples: Samples = 32,
    block_length: Annotated[int | None, typer.Option(min=1, help="Default: the model's. 1 is exact.")] = None,
    seed: Seed = 0,
    batch_size: Rows = 8,
    device: Device = None,
    dtype: Dtype = "auto",
    as_json: ResultsAsJson = False,
) -> None:
    """
    Bound how likely the model finds texts, answers and images.

    The perplexity is an upper bound. Rows are those of training: `text`; `prompt` and `completion`; `messages`;
    `image` and `caption`. Of a row what training would learn counts, given what stands before it.
    """
    from ..pipeline_loading import resolve_model

    resolve_model(model)  # before torch is imported
    from .evaluate_runs import evaluate_likelihood, load_rows

    rows = load_rows(data, split, limit)
    settings: dict[str, Any] = {"num_samples": num_samples, "block_length": block_length}
    pipe = load(model, device, dtype)
    results = evaluate_likelihood(pipe, rows, output, seed=seed, batch_size=batch_size, **settings)
    _report(results, output, as_json, task="likelihood", model=model, data=data, split=split, seed=seed, **settings)


def tasks_of_lm_eval(
    tasks: Annotated[list[str], typer.Argument(help="Names of tasks, such as arc_easy.")],
    output: Results = Path("evaluation/lm-eval"),
    model: Model = "emoji",
    include_path: Annotated[str | None, typer.Option(help="A folder with tasks of your own, as YAML.")] = None,
    limit: Limit = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Examples before each. Default: the task's.")] = None,
    num_samples: Samples = 32,
    seed: Seed = 0,
    batch_size: Rows = 8,
    device: Device = None,
    dtype: Dtype = "auto",
    as_json: ResultsAsJson = False,
) -> None:
    """
    Run tasks of lm-eval, the Language Model Evaluation Harness.

    Tasks are of text alone. `python -m transformers_llada_uni.evaluation run --model llada-uni ...` has all options of
    lm-eval.
    """
    from ..pipeline_loading import best_device, dtype_of, locate

    located = locate(model)  # before torch is imported
    from .evaluate_runs import evaluate_tasks

    device = device or best_device()
    name = str(dtype_of(dtype, device)).removeprefix("torch.")
    plan: dict[str, Any] = {"limit": limit, "num_fewshot": num_fewshot, "num_samples": num_samples, "seed": seed}

    def pretrained() -> Any:
        return located.path if located.adapter is None else load_to_talk(model, device, dtype)

    results = evaluate_tasks(pretrained, device, name, tasks, output, include_path, batch_size=batch_size, **plan)
    _report(results, output, as_json, task="lm-eval", model=model, **plan)


COMMANDS: dict[str, Callable[..., None]] = {
    "images": images,
    "questions": questions,
    "likelihood": likelihood,
    "lm-eval": tasks_of_lm_eval,
}


def _report(results: dict[str, Any], output: Path, as_json: bool, **described: Any) -> None:
    from .evaluate_runs import report, table_of

    written = report(results, output, described)
    typer.echo(json.dumps(written, ensure_ascii=False) if as_json else "\n".join(table_of(results)))
