"""
Evaluation: likelihood bounds, lm_eval (`pip install llada-uni[evaluation]`) and visual question answering.

Importing `transformers_llada_uni` makes lm_eval know the model `llada-uni`.
"""

import importlib
from typing import TYPE_CHECKING, Any


_EXPORTS = {
    "likelihood": ["LikelihoodBound", "completion_likelihood"],
    "likelihood_noise": ["LikelihoodNoise"],
    "lm_eval_model": ["LLaDAUniLM"],
    "visual_question_answering": [
        "VisualQuestionAnsweringAccuracy",
        "evaluate_visual_question_answering",
        "normalize_answer",
        "visual_question_answering_accuracy",
    ],
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = sorted(_MODULE_OF)

if TYPE_CHECKING:
    from .likelihood import *
    from .likelihood_noise import *
    from .lm_eval_model import *
    from .visual_question_answering import *


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
