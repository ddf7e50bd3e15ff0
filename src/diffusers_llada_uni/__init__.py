"""
LLaDA2.0-Uni for diffusers: a pipeline from prompts and images to images, and the embedder of image codes, with rooms
for `training` and `evaluation`.

Importing the package makes `DiffusionPipeline.from_pretrained` find the pipeline by its name.
"""

from transformers_llada_uni import __version__ as __version__

from . import pipeline_registration as pipeline_registration
from .code_decoding import CodeDecoder as CodeDecoder
from .code_generation import CodeGenerator as CodeGenerator
from .embedded_checkpoints import embedded_checkpoint as embedded_checkpoint
from .pipeline_llada_uni import LLaDAUniPipeline as LLaDAUniPipeline
from .pipeline_output import LLaDAUniPipelineOutput as LLaDAUniPipelineOutput
from .semantic_embedder import LLaDAUniSemanticEmbedder as LLaDAUniSemanticEmbedder
