"""
Training of the language model and of the image tokenizer, on trl and transformers' Trainer (`pip install
llada-uni[train]`). See docs/training.md.
"""

from typing import TYPE_CHECKING

from ..lazy_names import attach
from ..optional_dependencies import require_extra


require_extra("train", "datasets", "trl")

_EXPORTS = {
    "data.preparation": ["mix_datasets", "prepare_dataset", "prepare_preference_dataset", "prepare_prompts"],
    "dpo_config": ["LLaDAUniDPOConfig"],
    "dpo_trainer": ["LLaDAUniDPOTrainer"],
    "grpo_config": ["LLaDAUniGRPOConfig"],
    "grpo_trainer": ["LLaDAUniGRPOTrainer"],
    "data.image_codes": ["encode_images"],
    "image_tokenizer_config": ["LLaDAUniImageTokenizerConfig"],
    "image_tokenizer_trainer": ["LLaDAUniImageTokenizerTrainer"],
    "lora": ["lora_config"],
    "objective.noise": ["BlockDiffusionNoise"],
    "objective.block_diffusion": ["add_block_diffusion_head"],
    "objective.router_balancing": ["RouterBalancing"],
    "sft_config": ["LLaDAUniSFTConfig"],
    "sft_trainer": ["LLaDAUniSFTTrainer"],
    "stages": ["STAGES"],
}
__getattr__, __dir__, __all__ = attach(globals(), _EXPORTS)

if TYPE_CHECKING:
    from .data.image_codes import *
    from .data.preparation import *
    from .dpo_config import *
    from .dpo_trainer import *
    from .grpo_config import *
    from .grpo_trainer import *
    from .image_tokenizer_config import *
    from .image_tokenizer_trainer import *
    from .lora import *
    from .objective.block_diffusion import *
    from .objective.noise import *
    from .objective.router_balancing import *
    from .sft_config import *
    from .sft_trainer import *
    from .stages import *
