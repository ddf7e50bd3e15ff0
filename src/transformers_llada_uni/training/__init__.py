# ruff: noqa: E402
"""
Training of the language model and of the image tokenizer, on trl and transformers' Trainer (`pip install
llada-uni[train]`). See docs/training.md.
"""

from ..optional_dependencies import require_extra


require_extra("train", "datasets", "trl")

from .data.image_codes import encode_images as encode_images
from .data.preparation import mix_datasets as mix_datasets
from .data.preparation import prepare_dataset as prepare_dataset
from .data.preparation import prepare_preference_dataset as prepare_preference_dataset
from .data.preparation import prepare_prompts as prepare_prompts
from .dpo_config import LLaDAUniDPOConfig as LLaDAUniDPOConfig
from .dpo_trainer import LLaDAUniDPOTrainer as LLaDAUniDPOTrainer
from .grpo_config import LLaDAUniGRPOConfig as LLaDAUniGRPOConfig
from .grpo_trainer import LLaDAUniGRPOTrainer as LLaDAUniGRPOTrainer
from .image_tokenizer_alignment_config import (
    LLaDAUniImageTokenizerAlignmentConfig as LLaDAUniImageTokenizerAlignmentConfig,
)
from .image_tokenizer_alignment_trainer import (
    LLaDAUniImageTokenizerAlignmentTrainer as LLaDAUniImageTokenizerAlignmentTrainer,
)
from .image_tokenizer_config import LLaDAUniImageTokenizerConfig as LLaDAUniImageTokenizerConfig
from .image_tokenizer_trainer import LLaDAUniImageTokenizerTrainer as LLaDAUniImageTokenizerTrainer
from .lora import lora_config as lora_config
from .objective.block_diffusion import add_block_diffusion_head as add_block_diffusion_head
from .objective.noise import BlockDiffusionNoise as BlockDiffusionNoise
from .objective.router_balancing import RouterBalancing as RouterBalancing
from .recipes import RECIPES as RECIPES
from .sft_config import LLaDAUniSFTConfig as LLaDAUniSFTConfig
from .sft_trainer import LLaDAUniSFTTrainer as LLaDAUniSFTTrainer
from .stages import STAGES as STAGES
