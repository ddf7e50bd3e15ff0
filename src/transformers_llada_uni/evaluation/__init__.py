"""
Evaluation: likelihood bounds, lm_eval's model, visual question answering (`pip install "llada-uni[evaluation]"`). No
training, no images to be drawn: those are `diffusers_llada_uni.evaluation`'s.
"""

from typing import TYPE_CHECKING

from ..lazy_names import attach
from ..optional_dependencies import require_extra


require_extra("evaluation", "datasets", "evaluate", "trl")

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
