"""
Training of the autoencoder, the diffusion decoder, and its few-step distillation (`pip install llada-uni[train]`). See
docs/training.md.
"""

from .autoencoder_config import LLaDAUniAutoencoderConfig as LLaDAUniAutoencoderConfig
from .autoencoder_trainer import LLaDAUniAutoencoderTrainer as LLaDAUniAutoencoderTrainer
from .decoder_config import LLaDAUniDecoderConfig as LLaDAUniDecoderConfig
from .decoder_data import prepare_decoder_dataset as prepare_decoder_dataset
from .decoder_stages import DECODER_STAGES as DECODER_STAGES
from .decoder_trainer import LLaDAUniDecoderTrainer as LLaDAUniDecoderTrainer
from .distillation_config import LLaDAUniDistillationConfig as LLaDAUniDistillationConfig
from .distillation_trainer import LLaDAUniDistillationTrainer as LLaDAUniDistillationTrainer
