"""Evaluation of text-to-image generation: a resumable run over prompts, and metrics of its pictures."""

import importlib
from typing import TYPE_CHECKING, Any


_EXPORTS = {
    "picture_metrics": ["CLIPScore", "FrechetDistance", "frechet_distance"],
    "text_to_image": ["evaluate_text_to_image", "generate_pictures", "score_pictures"],
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = sorted(_MODULE_OF)

if TYPE_CHECKING:
    from .picture_metrics import *
    from .text_to_image import *


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
