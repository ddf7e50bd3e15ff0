"""One checkpoint whose weights are the mean of several of a run (LLaDA2.0, arXiv 2512.15745)."""

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..input_checks import check_integer
from .folder_writing import copy_chat_templates, folder_at_once


# Of a trainer, and of no use beside other weights
OF_THE_RUN = ("optimizer", "scheduler", "rng_state", "trainer_state", "training_args", "trained_parameters", "scaler")


def best_checkpoints(
    run: str | Path, count: int, metric: str = "eval_loss", greater_is_better: bool = False
) -> list[Path]:
    """
    The checkpoints of a run that its own evaluation found best, the best first.

    Args:
        run: The `output_dir` of a training run, with its `checkpoint-N`.
        count: How many.
        metric: A number that the run has logged at the steps of its checkpoints.
        greater_is_better: Whether the highest is best, and not the lowest.

    Raises:
        ValueError, TypeError: if there are fewer checkpoints with that number.
    """
    check_integer("count", count, 1)
    found: list[tuple[float, Path]] = []
    for state_file in Path(run).glob("checkpoint-*/trainer_state.json"):
        state = json.loads(state_file.read_text(encoding="utf-8"))
        values = [
            entry[metric]
            for entry in state["log_history"]
            if entry.get("step") == state["global_step"] and metric in entry
        ]
        if values and math.isfinite(values[-1]):
            found.append((values[-1] if not greater_is_better else -values[-1], state_file.parent))
    if len(found) < count:
        raise ValueError(
            f"`run` {str(run)!r} has {len(found)} checkpoints with a logged {metric!r}, but `count` is {count}."
        )
    return [checkpoint for _, checkpoint in sorted(found)[:count]]


def merge_checkpoints(checkpoints: Sequence[str | Path], output: str | Path) -> None:
    """
    Writes the mean of the weights of several checkpoints of one model, tensor by tensor: in memory is one file of
    weights, never a model. What else lies in the first checkpoint, such as configurations and tokenizer, is copied.

    Args:
        checkpoints: At least two folders of `save_pretrained` or of a trainer, with tensors of the same names and
            shapes.
        output: The folder to write.

    Raises:
        ValueError: for fewer than two, or checkpoints that do not fit each other.
        FileNotFoundError: for a folder without weights in safetensors.
        FileExistsError: if `output` exists.
    """
    folders, output = [Path(checkpoint) for checkpoint in checkpoints], Path(output)
    if len(folders) < 2:
        raise ValueError(f"`checkpoints` must be at least two, got {len(folders)}.")
    if output.exists():
        raise FileExistsError(f"`output` {str(output)!r} exists already.")
    places = [_places_of(folder) for folder in folders]
    for folder, others in zip(folders[1:], places[1:], strict=True):
        if others.keys() != places[0].keys():
            odd = sorted(others.keys() ^ places[0].keys())
            raise ValueError(
                f"`checkpoints`: {str(folder)!r} has other tensors than {str(folders[0])!r}, such as {odd[0]!r}."
            )
    with folder_at_once(output) as part:
        for file in tqdm(sorted(set(places[0].values())), desc="merging", unit="file"):
            names = [name for name, place in places[0].items() if place == file]
            save_file(dict(_means(names, places)), part / file.name, metadata={"format": "pt"})
        for file in folders[0].iterdir():
            if file.is_file() and file.suffix != ".safetensors" and not file.name.startswith(OF_THE_RUN):
                shutil.copy(file, part / file.name)
        copy_chat_templates(folders[0], part)


def _places_of(folder: Path) -> dict[str, Path]:
    """The file of each tensor."""
    if (folder / "model_index.json").is_file():
        raise ValueError(
            f"`checkpoints`: {str(folder)!r} is a pipeline; name the folder of its language model, "
            f"{str(folder / 'model')!r}, and put the mean into a pipeline by `llada-uni assemble`."
        )
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"`checkpoints`: {str(folder)!r} has an adapter; the mean of its factors is not the mean of what they do. "
            "Merge each into its model first (`llada-uni assemble ADAPTER --output FOLDER`, or `merge_and_unload`)."
        )
    if (folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        weight_map = json.loads((folder / SAFE_WEIGHTS_INDEX_NAME).read_text(encoding="utf-8"))["weight_map"]
        return {name: folder / file for name, file in weight_map.items()}
    file = folder / SAFE_WEIGHTS_NAME
    if not file.is_file():
        raise FileNotFoundError(f"`checkpoints`: there is no {SAFE_WEIGHTS_NAME} in {str(folder)!r}.")
    with safe_open(file, "pt") as weights:
        return dict.fromkeys(weights.keys(), file)


def _means(names: list[str], places: list[dict[str, Path]]) -> Iterator[tuple[str, torch.Tensor]]:
    with ExitStack() as stack:
        opened = {
            file: stack.enter_context(safe_open(file, "pt"))
            for file in {place[name] for place in places for name in names}
        }
        for name in names:
            tensors = [opened[place[name]].get_tensor(name) for place in places]
            if any(tensor.shape != tensors[0].shape for tensor in tensors):
                raise ValueError(f"`checkpoints`: {name!r} has shapes {[tuple(tensor.shape) for tensor in tensors]}.")
            if not tensors[0].is_floating_point():
                raise ValueError(f"`checkpoints`: {name!r} is {tensors[0].dtype}; only plain weights have a mean.")
            total = torch.zeros(tensors[0].shape, dtype=torch.float32)
            for tensor in tensors:
                total += tensor
            yield name, (total / len(tensors)).to(tensors[0].dtype)
