"""The model of a command, loaded for who waits for it: with progress bars in a terminal, and nowhere else."""

import sys
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from diffusers_llada_uni import LLaDAUniPipeline

    from ..answers import ChatModel


def load(model: str, device: str | None, dtype: str) -> "LLaDAUniPipeline":
    """See [`~llada_uni.pipeline_loading.load_pipeline`]."""
    from ..pipeline_loading import load_pipeline, resolve_model

    resolve_model(model)  # before torch is imported
    hide_progress_bars()
    pipe = load_pipeline(model, device, dtype)
    pipe.set_progress_bar_config(disable=not sys.stderr.isatty())
    return pipe


def load_to_talk(model: str, device: str | None, dtype: str) -> "ChatModel":
    """See [`~llada_uni.pipeline_loading.load_chat_model`]."""
    from ..pipeline_loading import load_chat_model, resolve_model

    resolve_model(model, takes_models=True)  # before torch is imported
    hide_progress_bars()
    return load_chat_model(model, device, dtype)


def hide_progress_bars() -> None:
    """Of what is loaded, where nobody looks."""
    if not sys.stderr.isatty():
        import diffusers
        import transformers

        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
