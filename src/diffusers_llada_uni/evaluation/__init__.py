"""Evaluation of text-to-image generation: a resumable run over prompts, and metrics of its images."""

from typing import TYPE_CHECKING

from transformers_llada_uni.lazy_names import attach


_EXPORTS = {
    "image_metrics": ["CLIPScore", "FrechetDistance", "ImageFeatures", "frechet_distance"],
    "text_to_image": ["evaluate_text_to_image", "generate_images", "score_images"],
}
__getattr__, __dir__, __all__ = attach(globals(), _EXPORTS)

if TYPE_CHECKING:
    from .image_metrics import *
    from .text_to_image import *
