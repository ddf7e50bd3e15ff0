"""ComfyUI itself: the only file that imports it, and only when a node needs it."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn


MODEL_FOLDER = "LLaDA-Uni"


def register_model_folder() -> None:
    """Adds `models/LLaDA-Uni` to the folders of models; does nothing without ComfyUI."""
    try:
        import folder_paths  # type: ignore[import-not-found]  # ComfyUI is not installed where types are checked
    except ModuleNotFoundError:
        return
    folder_paths.add_model_folder_path(MODEL_FOLDER, str(Path(folder_paths.models_dir) / MODEL_FOLDER))


def model_folders() -> list[Path]:
    """Where pipelines lie."""
    import folder_paths

    return [Path(path) for path in folder_paths.get_folder_paths(MODEL_FOLDER)]


def device() -> torch.device:
    """Where ComfyUI computes."""
    return _management().get_torch_device()


def takes_bfloat16(device: torch.device) -> bool:
    """Whether ComfyUI would use bfloat16 there."""
    return device.type != "cpu" and _management().should_use_bf16(device)


class Progress:
    """
    The bar of the node that runs. Whatever moves it also ends the node, if the user has asked for that.

    Args:
        total: The bar's length.
    """

    def __init__(self, total: int) -> None:
        import comfy.utils  # type: ignore[import-not-found]

        self.total = total
        self._bar = comfy.utils.ProgressBar(total)
        self.move_to(0)

    def move_to(self, done: int) -> None:
        """
        Raises:
            comfy.model_management.InterruptProcessingException: if the user has interrupted.
        """
        _management().throw_exception_if_processing_interrupted()
        self._bar.update_absolute(min(done, self.total), self.total)


class LLaDAUniComponent(nn.ModuleList):
    """Around a module: ComfyUI writes attributes such as `device` into what it moves, which transformers refuses."""


def managed(module: nn.Module, release: Callable[[], None] | None = None) -> Any:
    """
    A module that ComfyUI moves: onto the card with [`bring_in`], and off it when something else needs the room.

    Args:
        module: On the CPU.
        release: Frees what else it keeps on the card; called before it leaves.

    Returns:
        A `comfy.model_patcher.ModelPatcher`.
    """
    devices = _management().get_torch_device(), _management().unet_offload_device()
    patcher = _whole_model_patcher()(LLaDAUniComponent([module]), *devices)
    patcher.release = release
    return patcher


@cache  # classes are kept by cycles, and what they know would be too
def _whole_model_patcher() -> type:
    from comfy.model_patcher import ModelPatcher  # type: ignore[import-not-found]

    class WholeModelPatcher(ModelPatcher):
        """Moves all or nothing: only ComfyUI's own layers could compute with weights that wait elsewhere."""

        release: Callable[[], None] | None = None

        def load(self, device_to: Any = None, *args: Any, **kwargs: Any) -> Any:
            return super().load(device_to, full_load=True)

        def partially_unload(self, *args: Any, **kwargs: Any) -> int:
            return 0  # bytes freed; ComfyUI then takes away all of it

        def detach(self, *args: Any, **kwargs: Any) -> Any:
            if self.release is not None:
                self.release()
            return super().detach(*args, **kwargs)

    return WholeModelPatcher


def bring_in(patchers: list[Any], working_bytes: int) -> None:
    """
    Puts modules onto the card.

    Args:
        patchers: Of [`managed`].
        working_bytes: What computing with them takes beside their weights.
    """
    _management().load_models_gpu(patchers, memory_required=working_bytes)


def take_away(patchers: list[Any]) -> None:
    """Takes modules off the card, and gives its memory back."""
    management = _management()
    others = [loaded for loaded in management.current_loaded_models if loaded.model not in patchers]
    management.free_memory(1e30, management.get_torch_device(), others)
    management.soft_empty_cache()


def _management() -> Any:
    import comfy.model_management as management  # type: ignore[import-not-found]

    return management
