"""
A stand-in for ComfyUI: of each of its modules what the nodes use, with the same signatures as ComfyUI 0.30.

`Card` counts what is on it, and makes room as ComfyUI does: whole models leave, those longest unused first.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn


class InterruptProcessingException(BaseException):
    pass


class ModelPatcher:
    """Counts its module as moved; the device is a CPU in any case."""

    def __init__(self, model: nn.Module, load_device, offload_device, size: int = 0, weight_inplace_update=False):
        model.device = offload_device  # a model of transformers would refuse this
        self.model, self.load_device, self.offload_device = model, load_device, offload_device
        self.is_on_card, self.card = False, None

    def model_size(self) -> int:
        return sum(parameter.nbytes for parameter in self.model.parameters())

    def load(self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False) -> None:
        assert full_load, "its layers are none of ComfyUI's: half of them would stay behind"
        self.model.to(device_to)
        self.is_on_card = True

    def partially_unload(self, device_to, memory_to_free=0, force_patch_weights=False) -> int:
        raise AssertionError("half of its layers would be left behind")

    def detach(self, unpatch_all: bool = True) -> nn.Module:
        self.model.to(self.offload_device)
        self.is_on_card = False
        return self.model


@dataclass(eq=False)
class LoadedModel:
    model: ModelPatcher


@dataclass
class Card:
    """
    Args:
        size: Bytes of it.
        loaded: What is on it, the last used first.
        required: Of each call of `load_models_gpu` the memory that was asked for beside the weights.
        num_emptied: How often its memory was given back.
    """

    size: float = 1e12
    loaded: list[LoadedModel] = field(default_factory=list)
    required: list[int] = field(default_factory=list)
    num_emptied: int = 0

    def load_models_gpu(self, models, memory_required=0, force_patch_weights=False) -> None:
        self.required.append(memory_required)
        wanted = [loaded for loaded in self.loaded if loaded.model in models]
        known = [loaded.model for loaded in wanted]
        new = [LoadedModel(model) for model in models if model not in known]
        self.free_memory(memory_required + sum(each.model.model_size() for each in new), None, wanted)
        for each in new:
            each.model.load(each.model.load_device, lowvram_model_memory=0.1, full_load=False)
        self.loaded[:] = [*new, *wanted, *(each for each in self.loaded if each not in wanted)]

    def free_memory(self, memory_required, device, keep_loaded=()) -> None:
        for each in reversed([each for each in self.loaded if each not in keep_loaded]):
            if self.size - sum(other.model.model_size() for other in self.loaded) >= memory_required:
                return
            if each.model.partially_unload(each.model.offload_device, memory_required) < memory_required:
                each.model.detach()
                self.loaded.remove(each)

    def classes(self) -> list[str]:
        """Of the modules that are on it."""
        return sorted(type(loaded.model.model[0]).__name__ for loaded in self.loaded)


@dataclass
class Host:
    """
    What tests look at and set.

    Args:
        models_dir: `ComfyUI/models`.
        card: Its card.
        bars: Of each progress bar the values `(done, total)` it was moved to.
        interrupt_after: Moves of bars after which the user interrupts; `None` for never.
    """

    models_dir: Path
    card: Card = field(default_factory=Card)
    bars: list[list[tuple[int, int]]] = field(default_factory=list)
    interrupt_after: int | None = None

    def reset(self) -> None:
        self.card.free_memory(1e30, None)
        self.card.size, self.card.num_emptied, self.interrupt_after = 1e12, 0, None
        self.card.required.clear()
        self.bars.clear()

    def check_interrupt(self) -> None:
        if self.interrupt_after is not None and sum(map(len, self.bars)) >= self.interrupt_after:
            self.interrupt_after = None
            raise InterruptProcessingException()


def modules_of(host: Host) -> dict[str, ModuleType]:
    """ComfyUI's modules, by their names."""
    cpu = torch.device("cpu")

    class ProgressBar:
        def __init__(self, total: int, node_id: str | None = None):
            host.bars.append([])
            self.values = host.bars[-1]

        def update_absolute(self, value: int, total: int | None = None, preview: Any = None) -> None:
            assert total is not None and 0 <= value <= total
            self.values.append((value, total))

    def empty_cache(force: bool = False) -> None:
        host.card.num_emptied += 1

    folders: dict[str, list[str]] = {}
    contents: dict[str, dict[str, Any]] = {
        "comfy": {"__path__": []},
        "comfy.model_management": {
            "InterruptProcessingException": InterruptProcessingException,
            "current_loaded_models": host.card.loaded,
            "free_memory": host.card.free_memory,
            "get_torch_device": lambda: cpu,
            "load_models_gpu": host.card.load_models_gpu,
            "should_use_bf16": lambda device=None, **others: True,
            "soft_empty_cache": empty_cache,
            "throw_exception_if_processing_interrupted": host.check_interrupt,
            "unet_offload_device": lambda: cpu,
        },
        "comfy.model_patcher": {"ModelPatcher": ModelPatcher},
        "comfy.utils": {"ProgressBar": ProgressBar},
        "folder_paths": {
            "add_model_folder_path": lambda name, path, is_default=False: folders.setdefault(name, []).append(path),
            "get_folder_paths": lambda name: folders[name][:],
            "models_dir": str(host.models_dir),
        },
    }
    modules = {}
    for name, content in contents.items():
        modules[name] = ModuleType(name)
        vars(modules[name]).update(content)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, modules[name])
    return modules


def install(host: Host) -> None:
    sys.modules.update(modules_of(host))


def remove() -> None:
    for name in modules_of(Host(Path())):
        sys.modules.pop(name, None)
