"""What a pipeline's folder holds beside its components: adapters of its language model, and files for transformers."""

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin


ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
ROOT_FILES = ("config.json", "generation_config.json", WEIGHTS_INDEX)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model that a `PeftModel` is around, or the model itself."""
    if "peft" in sys.modules:
        from peft import PeftModel

        if isinstance(model, PeftModel):
            return model.get_base_model()
    return model


def wrapper_children(model: nn.Module) -> dict[str, str]:
    """Of each of peft's modules around another one, by its name, the attribute that is the other one."""
    if "peft" not in sys.modules:
        return {}  # and nobody has put such modules in
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    children = {BaseTunerLayer: "base_layer", AuxiliaryTrainingWrapper: "original_module"}
    return {
        name: child
        for name, module in model.named_modules()
        for kind, child in children.items()
        if isinstance(module, kind)
    }


def base_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a model as if it had no adapters."""
    children = wrapper_children(model)
    weights = {}
    for name, weight in model.state_dict().items():
        path: list[str] = []  # in the module with adapters
        base: list[str] = []  # in the one without
        for part in name.split("."):
            child = children.get(".".join(path))
            if child is not None and part != child:
                break  # a weight of the adapter
            path.append(part)
            base += [] if child is not None else [part]
        else:
            weights[".".join(base)] = weight
    return weights


def check_adapters(components: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: for adapters that a folder of a pipeline has no place for, before anything is written.
    """
    for name, component in components.items():
        if not isinstance(component, nn.Module) or not wrapper_children(component):
            continue
        if name != "model":
            raise ValueError(
                f"`{name}` has an adapter, which a pipeline is not saved with: take it off with "
                "`unload_lora_weights()`, after `fuse_lora()` to keep what it does."
            )
        adapters = list(getattr(component, "peft_config", {}))
        if len(adapters) > 1:
            raise ValueError(
                f"`model` has the adapters {', '.join(map(repr, adapters))}, and a pipeline is saved with one at "
                "most: take the others off with `delete_adapters(...)`."
            )
        if any(getattr(module, "merged", False) for module in component.modules()):
            raise ValueError(
                "`model` has an adapter that is merged into its weights: `unfuse_lora()` takes it out of them, "
                "`unload_lora_weights()` makes it stay."
            )


def save_with_adapter(model: nn.Module, save_directory: str | os.PathLike, **kwargs: Any) -> None:
    """Saves a model that has one adapter, and the adapter beside it: transformers loads both of such a folder."""
    from peft import get_peft_model_state_dict

    base = unwrapped(model)
    assert isinstance(base, PreTrainedModel)
    is_injected, base._hf_peft_config_loaded = base._hf_peft_config_loaded, False  # else it saves the adapter alone
    try:
        # transformers remembers the names of an adapter's file as if they were those of the model's.
        kwargs |= {"state_dict": base_state_dict(base), "save_original_format": False}
        type(base).save_pretrained(base, save_directory, **kwargs)
    finally:
        base._hf_peft_config_loaded = is_injected
    for name, config in getattr(model, "peft_config", {}).items():  # of one, or of none that is left
        weights = get_peft_model_state_dict(model, adapter_name=name)
        weights = {key: weight.contiguous() for key, weight in weights.items()}
        save_file(weights, Path(save_directory, ADAPTER_FILES[1]))
        config.save_pretrained(save_directory)


@contextmanager
def saved_as_a_whole(pipe: DiffusionPipeline, folder: str | os.PathLike) -> Iterator[None]:
    """Within it the pipeline's `model`, if it has an adapter, is saved with all its weights, and not the adapter's."""
    model = pipe.components.get("model")
    for name in ADAPTER_FILES if model is not None else ():
        Path(folder, "model", name).unlink(missing_ok=True)  # of what was saved here before
    if model is None or not wrapper_children(model):
        yield
        return
    base = unwrapped(model)

    def save_pretrained(
        save_directory: str | os.PathLike, variant: str | None = None, max_shard_size: int | str = "50GB"
    ) -> None:
        save_with_adapter(model, save_directory, variant=variant, max_shard_size=max_shard_size)

    pipe.register_modules(model=base)  # `model_index.json` names its class, and not peft's
    vars(base)["save_pretrained"] = save_pretrained
    try:
        yield
    finally:
        del vars(base)["save_pretrained"]
        pipe.register_modules(model=model)


def write_transformers_files(
    model: PreTrainedModel | None, processor: ProcessorMixin | None, folder: str | os.PathLike
) -> None:
    """
    Makes a pipeline's folder a checkpoint of transformers, too: its Auto classes read the configuration in the root,
    and an index there that leads into `model/`. A model with an adapter has none: it would be loaded without.
    """
    root, weights = Path(folder), Path(folder, "model", WEIGHTS)
    if model is None:
        return
    if getattr(model, "peft_config", None):
        for name in ROOT_FILES if Path(root, WEIGHTS_INDEX).is_file() else ():
            Path(root, name).unlink(missing_ok=True)  # of what was saved here before
        return
    index_file = weights.with_name(WEIGHTS_INDEX)
    if not weights.is_file() and not index_file.is_file():
        return  # weights of a variant, or on other machines
    if weights.is_file() and index_file.is_file():
        # One is of what was saved here before, and transformers reads the whole file, whichever is newer.
        min((weights, index_file), key=lambda file: file.stat().st_mtime_ns).unlink()
    if weights.is_file():
        with safe_open(weights, "pt") as file:
            names = list(file.keys())
        index: dict[str, Any] = {
            "metadata": {"total_size": weights.stat().st_size},
            "weight_map": dict.fromkeys(names, WEIGHTS),
        }
    else:
        index = json.loads(index_file.read_text(encoding="utf-8"))
    index["weight_map"] = {name: f"model/{file}" for name, file in index["weight_map"].items()}
    Path(root, WEIGHTS_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    model.config.save_pretrained(root)
    model.generation_config.save_pretrained(root)
    if processor is not None:
        processor.save_pretrained(root)
