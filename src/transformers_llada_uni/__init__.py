"""
LLaDA2.0-Uni for transformers: backbone, multimodal model, processors, block-diffusion generation and training.

Importing the package registers its classes with the Auto classes; the classes themselves are imported when first used.
"""

from typing import TYPE_CHECKING

from .auto_registration import register
from .lazy_names import attach


__version__ = "0.1.0"

_EXPORTS = {
    "generation.cache": ["BlockDiffusionCache"],
    "generation.sprint": ["SprintCache", "SprintConfig"],
    "configuration_llada2_moe": ["LLaDA2MoeConfig"],
    "configuration_llada_uni": ["LLaDAUniConfig"],
    "expert_offloading": ["expert_offload_device_map"],
    "generation.block_diffusion": ["BlockDiffusionGenerationMixin", "BlockDiffusionOutput"],
    "generation.interleaved": ["InterleavedGenerationMixin"],
    "generation.configuration": ["BlockDiffusionGenerationConfig"],
    "image_processing_llada_uni": ["LLaDAUniImageProcessor"],
    "modeling_llada2_moe": ["LLaDA2MoeForBlockDiffusion", "LLaDA2MoeModel", "LLaDA2MoePreTrainedModel"],
    "modeling_llada_uni": ["LLaDAUniForConditionalGeneration", "LLaDAUniModel", "LLaDAUniPreTrainedModel"],
    "processing_llada_uni": ["LLaDAUniProcessor"],
    "quantization_groupwise": ["GroupwiseQuantizationConfig"],
    "quantization_torchao": ["backbone_quantization_config"],
}
__getattr__, __dir__, __all__ = attach(globals(), _EXPORTS)

if TYPE_CHECKING:
    from .configuration_llada2_moe import *
    from .configuration_llada_uni import *
    from .expert_offloading import *
    from .generation.block_diffusion import *
    from .generation.cache import *
    from .generation.configuration import *
    from .generation.interleaved import *
    from .generation.sprint import *
    from .image_processing_llada_uni import *
    from .modeling_llada2_moe import *
    from .modeling_llada_uni import *
    from .processing_llada_uni import *
    from .quantization_groupwise import *
    from .quantization_torchao import *


register()
