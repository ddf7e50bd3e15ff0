"""
Evaluation: likelihood bounds, lm_eval (`pip install llada-uni[evaluation]`) and visual question answering.

Importing `transformers_llada_uni` makes lm_eval know the model `llada-uni`.
"""

from typing import TYPE_CHECKING

from ..lazy_names import attach


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
__getattr__, __dir__, __all__ = attach(globals(), _EXPORTS)

if TYPE_CHECKING:
    from .likelihood import *
    from .likelihood_noise import *
    from .lm_eval_model import *
    from .visual_question_answering import *
