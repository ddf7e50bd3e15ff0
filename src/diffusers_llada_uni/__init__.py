"""
LLaDA2.0-Uni for diffusers: a pipeline from prompts and pictures to pictures, and the embedder of image codes.

Importing the package lets `DiffusionPipeline.from_pretrained` find the pipeline by its name, and registers the classes
of `transformers_llada_uni` with the Auto classes; the classes themselves are imported when first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

import transformers_llada_uni

from .pipeline_registration import register


__version__ = transformers_llada_uni.__version__

_EXPORTS = {
    "pipeline_llada_uni": ["LLaDAUniPipeline"],
    "pipeline_output": ["LLaDAUniPipelineOutput"],
    "semantic_embedder": ["LLaDAUniSemanticEmbedder"],
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = sorted(_MODULE_OF)

if TYPE_CHECKING:
    from .pipeline_llada_uni import LLaDAUniPipeline as LLaDAUniPipeline
    from .pipeline_output import LLaDAUniPipelineOutput as LLaDAUniPipelineOutput
    from .semantic_embedder import LLaDAUniSemanticEmbedder as LLaDAUniSemanticEmbedder


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


register()
