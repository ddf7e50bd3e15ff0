"""Makes diffusers find the pipeline by its name and for its tasks, and load its components."""

import diffusers
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
from transformers.utils import logging

from .pipeline_llada_uni import LLaDAUniPipeline


# Importing the tables imports all pipelines of diffusers, some of which make transformers warn of what they lack.
verbosity = logging.get_verbosity()
logging.set_verbosity_error()
from diffusers.pipelines import auto_pipeline  # noqa: E402


logging.set_verbosity(verbosity)

# diffusers has no registry: it takes the class that `model_index.json` names as an attribute of itself,
diffusers.LLaDAUniPipeline = LLaDAUniPipeline  # type: ignore[attr-defined]
# AutoPipeline goes by tables,
auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING["llada-uni"] = LLaDAUniPipeline
auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING["llada-uni"] = LLaDAUniPipeline
auto_pipeline.AUTO_INPAINT_PIPELINES_MAPPING["llada-uni"] = LLaDAUniPipeline
# and it downloads only the folders of components from modules that it lists.
for module in (
    "transformers_llada_uni.modeling_llada_uni",
    "transformers_llada_uni.processing_llada_uni",
    "diffusers_llada_uni.semantic_embedder",
):
    LOADABLE_CLASSES.setdefault(module, {})
