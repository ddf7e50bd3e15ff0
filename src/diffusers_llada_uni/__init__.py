"""
LLaDA2.0-Uni for diffusers: a pipeline from prompts and pictures to pictures, and the embedder of image codes.

Importing the package lets `DiffusionPipeline.from_pretrained` find the pipeline by its name, and registers the classes
of `transformers_llada_uni` with the Auto classes; the classes themselves are imported when first used.
"""

from typing import TYPE_CHECKING

import transformers_llada_uni
from transformers_llada_uni.lazy_names import attach

from .pipeline_registration import register


__version__ = transformers_llada_uni.__version__

_EXPORTS = {
    "embedded_checkpoints": ["embedded_checkpoint"],
    "pipeline_llada_uni": ["LLaDAUniPipeline"],
    "pipeline_output": ["LLaDAUniPipelineOutput"],
    "semantic_embedder": ["LLaDAUniSemanticEmbedder"],
}
__getattr__, __dir__, __all__ = attach(globals(), _EXPORTS)

if TYPE_CHECKING:
    from .embedded_checkpoints import embedded_checkpoint as embedded_checkpoint
    from .pipeline_llada_uni import LLaDAUniPipeline as LLaDAUniPipeline
    from .pipeline_output import LLaDAUniPipelineOutput as LLaDAUniPipelineOutput
    from .semantic_embedder import LLaDAUniSemanticEmbedder as LLaDAUniSemanticEmbedder


register()
