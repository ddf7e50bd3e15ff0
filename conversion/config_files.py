"""JSON files of a checkpoint, which strangers write: what is wrong with them is named by file and key."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import get_ident
from typing import Any

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook


MAX_DEPTH = 64  # of lists and objects within each other, far beyond any config's


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no finite number")
    return value


def _check_depth(content: Any) -> None:
    level = [content]
    for _ in range(MAX_DEPTH):
        level = [part for value in level if isinstance(value, dict | list) for part in _parts(value)]
        if not level:
            return
    raise ValueError(f"values are nested more than {MAX_DEPTH} deep")


def _parts(value: dict[str, Any] | list[Any]) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value


def read_json(path: Path) -> dict[str, Any]:
    """
    The object in a JSON file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a JSON object, holds NaN or infinity, or is nested too deeply.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_float=_finite, parse_constant=_finite)
        _check_depth(content)
    except RecursionError as error:
        raise ValueError(f"{path} is not valid JSON: values are nested more than {MAX_DEPTH} deep.") from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} should hold a JSON object, got {type(content).__name__}.")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def naming(*files: Path, what: str = "is not valid") -> Iterator[None]:
    """What the code of others raises over the content of `files` becomes a ValueError of one line that names them."""
    try:
        yield
    except Exception as error:
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        message = " ".join(str(error).split())
        raise ValueError(f"{' or '.join(map(str, files))} {what}: {kind}{message}".rstrip(": .") + ".") from error


def check_keys(config: Mapping[str, Any], config_class: type) -> None:
    """Raises a `ValueError` if a setting would take the place of a method of its config class."""
    taken = [name for name in config if callable(getattr(config_class, name, None))]
    if taken:
        raise ValueError(f"`{taken[0]}` cannot be a setting of {config_class.__name__}")


def _is_like(value: Any, example: Any) -> bool:
    if isinstance(example, bool | str):
        return isinstance(value, type(example))
    if isinstance(example, list | tuple):
        return isinstance(value, list | tuple) and bool(value) and all(_is_like(part, example[0]) for part in value)
    is_number = isinstance(value, int if isinstance(example, int) else int | float) and not isinstance(value, bool)
    return is_number and (value > 0 or example == 0)


def check_settings(config: Mapping[str, Any], examples: Mapping[str, Any]) -> None:
    """
    Classes that check nothing need this for what no tensor's shape would refute.

    Args:
        config: Settings, as JSON gives them.
        examples: For names, a value of the type that is expected. Numbers must be above 0 unless the example is 0;
            lists may have another length, but not be empty.

    Raises:
        ValueError: naming the first setting that is unlike its example.
    """
    for name, example in examples.items():
        if name in config and not _is_like(config[name], example):
            raise ValueError(f"`{name}` should be a value like {json.dumps(example)}, got {config[name]!r:.80}")


COUNTS = re.compile(r"(^|_)(n|num)_.*(layers|experts)$|^depth$|^layers_per_block$")


@contextmanager
def building(config: Mapping[str, Any], num_tensors: int) -> Iterator[None]:
    """
    For building a model of `config` without data, whose weights are in files that hold `num_tensors`: stops where it
    gets out of hand. A few tensors too many or too few are for others to name.

    Raises:
        ValueError: if the model has many more tensors than the files.
    """
    for name, value in config.items():
        if COUNTS.search(name) and isinstance(value, int) and value > num_tensors:
            raise ValueError(f"`{name}` is {value}, but the files hold only {num_tensors} tensors")
    left, thread = most_tensors(num_tensors), get_ident()

    def count(*_: Any) -> None:
        nonlocal left
        left -= get_ident() == thread  # the hook sees what other threads build, too
        if left < 0:
            raise ValueError(f"it describes many more tensors than the {num_tensors} that the files hold")

    hook = register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"):
            yield
    finally:
        hook.remove()


def most_tensors(num_tensors: int) -> int:
    """How many tensors a config may describe before it is refused as a whole."""
    return 2 * num_tensors + 1000
