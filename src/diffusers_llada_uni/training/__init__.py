"""
Training of the autoencoder, the diffusion decoder, and its few-step distillation (`pip install llada-uni[train]`). See
docs/training.md.
"""

from typing import TYPE_CHECKING

from transformers_llada_uni.lazy_names import attach


_EXPORTS = {
    "autoencoder_config": ["LLaDAUniAutoencoderConfig"],
    "autoencoder_trainer": ["LLaDAUniAutoencoderTrainer"],
    "decoder_config": ["LLaDAUniDecoderConfig"],
    "decoder_data": ["prepare_decoder_dataset"],
    "decoder_trainer": ["LLaDAUniDecoderTrainer"],
    "distillation_config": ["LLaDAUniDistillationConfig"],
    "distillation_trainer": ["LLaDAUniDistillationTrainer"],
}
__getattr__, __dir__, __all__ = attach(globals(), _EXPORTS)

if TYPE_CHECKING:
    from .autoencoder_config import *
    from .autoencoder_trainer import *
    from .decoder_config import *
    from .decoder_data import *
    from .decoder_trainer import *
    from .distillation_config import *
    from .distillation_trainer import *
