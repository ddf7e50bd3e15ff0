"""Makes lm_eval know the model `llada-uni`, without importing lm_eval or torch."""

from types import ModuleType

from ..import_hooks import after_import


MODEL_NAME = "llada-uni"


def _add_model(module: ModuleType) -> None:
    # lm_eval has no entry points for models. Its registry takes a path, and imports that when the model is asked for.
    from lm_eval.api.registry import model_registry

    if MODEL_NAME not in model_registry:
        model_registry.register(MODEL_NAME, target=f"{__package__}.lm_eval_model:LLaDAUniLM")


def register_with_lm_eval() -> None:
    """
    Adds the model now or, where lm_eval's models are not loaded yet, as soon as they are. (Not earlier: lm_eval
    imports its own models only while its registry is empty.)
    """
    after_import("lm_eval.models", _add_model)
