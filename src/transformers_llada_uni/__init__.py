"""
LLaDA2.0-Uni for transformers: backbone, multimodal model, processors and block-diffusion generation, with rooms for
`generation`, `kernels`, `loading`, `training` and `evaluation`. Nothing in here knows diffusers.

Importing the package makes the Auto classes of transformers know its classes.
"""

from . import auto_registration as auto_registration
from .configuration_llada2_moe import LLaDA2MoeConfig as LLaDA2MoeConfig
from .configuration_llada_uni import LLaDAUniConfig as LLaDAUniConfig
from .generation.block_diffusion import BlockDiffusionGenerationMixin as BlockDiffusionGenerationMixin
from .generation.block_diffusion import BlockDiffusionOutput as BlockDiffusionOutput
from .generation.cache import BlockDiffusionCache as BlockDiffusionCache
from .generation.configuration import BlockDiffusionGenerationConfig as BlockDiffusionGenerationConfig
from .generation.interleaved import InterleavedGenerationMixin as InterleavedGenerationMixin
from .generation.sprint import SprintConfig as SprintConfig
from .generation.trajectory import Trajectory as Trajectory
from .image_processing_llada_uni import LLaDAUniImageProcessor as LLaDAUniImageProcessor
from .loading.expert_offloading import expert_offload_device_map as expert_offload_device_map
from .loading.quantization_groupwise import GroupwiseQuantizationConfig as GroupwiseQuantizationConfig
from .loading.quantization_torchao import backbone_quantization_config as backbone_quantization_config
from .modeling_llada2_moe import LLaDA2MoeForBlockDiffusion as LLaDA2MoeForBlockDiffusion
from .modeling_llada2_moe import LLaDA2MoeModel as LLaDA2MoeModel
from .modeling_llada2_moe import LLaDA2MoePreTrainedModel as LLaDA2MoePreTrainedModel
from .modeling_llada_uni import LLaDAUniForConditionalGeneration as LLaDAUniForConditionalGeneration
from .modeling_llada_uni import LLaDAUniModel as LLaDAUniModel
from .modeling_llada_uni import LLaDAUniPreTrainedModel as LLaDAUniPreTrainedModel
from .processing_llada_uni import LLaDAUniProcessor as LLaDAUniProcessor


__version__ = "0.1.0"
