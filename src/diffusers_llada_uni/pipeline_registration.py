"""Makes diffusers find the pipeline by its name, and load its components."""

import diffusers
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

from .pipeline_llada_uni import LLaDAUniPipeline


# diffusers has no registry: it takes the class that `model_index.json` names as an attribute of itself,
diffusers.LLaDAUniPipeline = LLaDAUniPipeline
# and downloads only the folders of components from modules that it lists.
for module in (
    "transformers_llada_uni.modeling_llada_uni",
    "transformers_llada_uni.processing_llada_uni",
    "diffusers_llada_uni.semantic_embedder",
):
    LOADABLE_CLASSES.setdefault(module, {})
