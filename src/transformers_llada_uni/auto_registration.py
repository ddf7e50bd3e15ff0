"""
Makes the Auto classes of transformers know this package, without importing torch.

transformers resolves a `model_type` by name: its tables map the model type to a class name, and the class is looked up
in `transformers.models.<model_type>` when it is first needed. We add our names to the same tables and let those two
module names lead to this package. `AutoConfig.register` and its siblings would do too, but they take classes, and so
would import torch and every modeling file as soon as this package is imported.
"""

import sys
from types import ModuleType

from .evaluation.lm_eval_registration import register_with_lm_eval
from .import_hooks import after_import


PACKAGE = "transformers_llada_uni"

CONFIGS = {"llada2_moe": "LLaDA2MoeConfig", "llada_uni": "LLaDAUniConfig"}

# module of transformers -> table in that module -> model type -> class
NAMES: dict[str, dict[str, dict[str, str | dict[str, str]]]] = {
    "transformers.models.auto.auto_mappings": {
        "CONFIG_MAPPING_NAMES": CONFIGS,
        "PROCESSOR_MAPPING_NAMES": {"llada_uni": "LLaDAUniProcessor"},
        "IMAGE_PROCESSOR_MAPPING_NAMES": {"llada_uni": {"pil": "LLaDAUniImageProcessor"}},
    },
    "transformers.models.auto.configuration_auto": {"CONFIG_MAPPING_NAMES": CONFIGS},  # a copy of the above
    "transformers.models.auto.modeling_auto": {
        "MODEL_MAPPING_NAMES": {"llada2_moe": "LLaDA2MoeModel", "llada_uni": "LLaDAUniModel"},
        "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": {"llada2_moe": "LLaDA2MoeForBlockDiffusion"},
        "MODEL_FOR_MASKED_LM_MAPPING_NAMES": {"llada2_moe": "LLaDA2MoeForBlockDiffusion"},
        "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES": {"llada_uni": "LLaDAUniForConditionalGeneration"},
        "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES": {"llada_uni": "LLaDAUniForConditionalGeneration"},
    },
}


def _add_names(module: ModuleType) -> None:
    for table, entries in NAMES[module.__name__].items():
        getattr(module, table).update(entries)


def _add_configs_to_existing_mappings() -> None:
    """Mappings made before this package was imported have already turned the table of configs round."""
    auto_factory = sys.modules.get("transformers.models.auto.auto_factory")
    if auto_factory is None:
        return
    for name, module in list(sys.modules.items()):
        if name.startswith("transformers.models.auto."):
            for value in vars(module).values():
                if isinstance(value, auto_factory._LazyAutoMapping):
                    value._reverse_config_mapping.update(
                        {config: model_type for model_type, config in CONFIGS.items()}
                    )


def register() -> None:
    """Adds our classes to the Auto classes, now or, where transformers is not loaded yet, as soon as it is."""
    for model_type in CONFIGS:
        sys.modules.setdefault(f"transformers.models.{model_type}", sys.modules[PACKAGE])
    for name in NAMES:
        after_import(name, _add_names)
    _add_configs_to_existing_mappings()
    register_with_lm_eval()
