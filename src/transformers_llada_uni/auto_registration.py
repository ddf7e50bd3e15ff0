"""Makes the Auto classes of transformers know this package."""

from typing import Any

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForMultimodalLM,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from .configuration_llada2_moe import LLaDA2MoeConfig
from .configuration_llada_uni import LLaDAUniConfig
from .image_processing_llada_uni import LLaDAUniImageProcessor
from .modeling_llada2_moe import LLaDA2MoeForBlockDiffusion, LLaDA2MoeModel
from .modeling_llada_uni import LLaDAUniForConditionalGeneration, LLaDAUniModel
from .processing_llada_uni import LLaDAUniProcessor


MODELS: dict[type[PreTrainedConfig], dict[Any, type[PreTrainedModel]]] = {
    LLaDA2MoeConfig: {
        AutoModel: LLaDA2MoeModel,
        AutoModelForCausalLM: LLaDA2MoeForBlockDiffusion,
        AutoModelForMaskedLM: LLaDA2MoeForBlockDiffusion,
    },
    LLaDAUniConfig: {
        AutoModel: LLaDAUniModel,
        AutoModelForImageTextToText: LLaDAUniForConditionalGeneration,
        AutoModelForMultimodalLM: LLaDAUniForConditionalGeneration,
    },
}
# `transformers serve` and pipelines look for a name in these lists, and not for a class in the registries.
NAMES = {
    AutoModelForCausalLM: MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    AutoModelForImageTextToText: MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    AutoModelForMultimodalLM: MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
}
for config_class, model_classes in MODELS.items():
    # Released folders say `auto_map`, and their code's classes register the same model types when it is run.
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    for auto_class, model_class in model_classes.items():
        auto_class.register(config_class, model_class, exist_ok=True)
        if auto_class in NAMES:
            NAMES[auto_class][config_class.model_type] = model_class.__name__
AutoProcessor.register(LLaDAUniConfig, LLaDAUniProcessor, exist_ok=True)
AutoImageProcessor.register(LLaDAUniConfig, image_processor_classes={"pil": LLaDAUniImageProcessor}, exist_ok=True)
