"""
Training of the diffusion decoder and its few-step distillation (`pip install llada-uni[train]`). See docs/training.md.
"""

import importlib
from typing import TYPE_CHECKING, Any


_EXPORTS = {
    "decoder_config": ["LLaDAUniDecoderConfig"],
    "decoder_data": ["prepare_decoder_dataset"],
    "decoder_trainer": ["LLaDAUniDecoderTrainer"],
    "distillation_config": ["LLaDAUniDistillationConfig"],
    "distillation_trainer": ["LLaDAUniDistillationTrainer"],
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = sorted(_MODULE_OF)

if TYPE_CHECKING:
    from .decoder_config import *
    from .decoder_data import *
    from .decoder_trainer import *
    from .distillation_config import *
    from .distillation_trainer import *


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
