"""Checks of arguments: each refuses a bad value by the argument's name, before any work is done."""

import math
from collections.abc import Sequence
from typing import Any

import torch


def check_integer(name: str, value: Any, minimum: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be an integer, got {value!r}.")
    if value < minimum:
        raise ValueError(f"`{name}` must be at least {minimum}, got {value}.")
    return value


def check_finite(name: str, value: Any, minimum: float, maximum: float = math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`{name}` must be a number, got {value!r}.")
    if not math.isfinite(value):
        raise ValueError(f"`{name}` must be a finite number, got {value}.")
    if not minimum <= value <= maximum:
        wanted = f"at least {minimum:g}" if maximum == math.inf else f"between {minimum:g} and {maximum:g}"
        raise ValueError(f"`{name}` must be {wanted}, got {value}.")


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    if isinstance(value, bool) or value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be True or False, got {value!r}.")


def check_side(name: str, value: Any, multiple: int) -> int:
    """A side of the picture, in pixels."""
    check_integer(name, value, minimum=1)
    if value % multiple:
        nearest = max(1, math.floor(value / multiple + 0.5)) * multiple
        raise ValueError(f"`{name}` must be a multiple of {multiple}, got {value}; the nearest is {nearest}.")
    return value


def check_prompt(prompt: Any) -> list[str]:
    """Returns the prompts as a new list."""
    if isinstance(prompt, str):
        prompts = [prompt]
    elif isinstance(prompt, (list, tuple)):
        prompts = list(prompt)
    else:
        raise TypeError(f"`prompt` must be a string or a list of strings, got {type(prompt).__name__}.")
    if not prompts:
        raise ValueError("`prompt` must hold at least one prompt, got an empty list.")
    for index, text in enumerate(prompts):
        if not isinstance(text, str):
            raise TypeError(f"`prompt` must hold strings only, got {type(text).__name__} at index {index}.")
        if not text.strip():
            raise ValueError(f"`prompt` must not be empty{f' (index {index})' if len(prompts) > 1 else ''}.")
    return prompts


def check_generator(generator: Any, num_images: int) -> None:
    generators = generator if isinstance(generator, list) else [generator]
    for item in generators:
        if not isinstance(item, torch.Generator) and not (item is None and generator is None):
            raise TypeError(f"`generator` must be a torch.Generator or a list of them, got {type(item).__name__}.")
    if isinstance(generator, list) and len(generator) != num_images:
        raise ValueError(f"`generator` has {len(generator)} generators for {num_images} images; give one for each.")


def check_callback(callback: Any, tensor_inputs: Any, known: Sequence[str]) -> None:
    if callback is not None and not callable(callback):
        raise TypeError(f"`callback_on_step_end` must be callable, got {type(callback).__name__}.")
    if isinstance(tensor_inputs, str) or not isinstance(tensor_inputs, Sequence):
        raise TypeError(f"`callback_on_step_end_tensor_inputs` must be a list of names, got {tensor_inputs!r}.")
    unknown = [name for name in tensor_inputs if name not in known]
    if unknown:
        raise ValueError(
            f"`callback_on_step_end_tensor_inputs` may name {', '.join(map(repr, known))}, got {unknown[0]!r}."
        )


def require_components(pipeline: Any, names: Sequence[str], purpose: str) -> None:
    missing = [name for name in names if getattr(pipeline, name) is None]
    if missing:
        raise ValueError(f"To {purpose} the pipeline needs the component `{missing[0]}`, which is not loaded.")


def check_settings(name: str, settings: Any, config_class: type) -> None:
    """A dict of fields of `config_class`, which refuses unknown names and values out of range itself."""
    if settings is None:
        return
    if not isinstance(settings, dict):
        raise TypeError(f"`{name}` must be a dict, got {type(settings).__name__}.")
    try:
        config_class(**settings)
    except (TypeError, ValueError) as error:
        raise type(error)(f"`{name}`: {error}") from error
