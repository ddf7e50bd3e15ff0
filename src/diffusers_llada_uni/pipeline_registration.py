"""
Lets `DiffusionPipeline.from_pretrained` find `LLaDAUniPipeline`, without importing diffusers (and so torch).

diffusers takes the class named in `model_index.json` as an attribute of the `diffusers` module, whose attributes are
imported when first asked for: a table maps class names to submodules. We add our name to that table, and let the
submodule's name lead to this package. The components' modules must be imported by then (diffusers looks in
`sys.modules` only); `pipeline_llada_uni` imports them all.

From the Hub diffusers downloads only the folders of components whose module it knows to be loadable: a second table.
"""

import sys
from types import ModuleType

from transformers_llada_uni.import_hooks import after_import


PACKAGE = "diffusers_llada_uni"
PIPELINES = ("LLaDAUniPipeline",)
SUBMODULE = "pipelines.llada_uni"
# as `model_index.json` names them
COMPONENT_MODULES = (
    "transformers_llada_uni.modeling_llada_uni",
    "transformers_llada_uni.processing_llada_uni",
    "diffusers_llada_uni.semantic_embedder",
)


def _add_names(diffusers: ModuleType) -> None:
    if hasattr(diffusers, "_class_to_module"):
        diffusers._class_to_module.update(dict.fromkeys(PIPELINES, SUBMODULE))
        return
    # DIFFUSERS_SLOW_IMPORT=1 makes diffusers an ordinary module, which has no table.
    for name in PIPELINES:
        setattr(diffusers, name, getattr(sys.modules[PACKAGE], name))


def _make_downloadable(pipeline_loading_utils: ModuleType) -> None:
    for module in COMPONENT_MODULES:
        pipeline_loading_utils.LOADABLE_CLASSES.setdefault(module, {})


def register() -> None:
    """Adds our pipeline to diffusers, now or, where diffusers is not loaded yet, as soon as it is."""
    sys.modules.setdefault(f"diffusers.{SUBMODULE}", sys.modules[PACKAGE])
    after_import("diffusers", _add_names)
    after_import("diffusers.pipelines.pipeline_loading_utils", _make_downloadable)
