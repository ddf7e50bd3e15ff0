"""What a stored result depends on, as a short text that tells whether it still holds. Digests have one home."""

import copyreg
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence, Set
from enum import Enum
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import PreTrainedTokenizerFast, ProcessorMixin

from .weight_hooks import weights_in_place


NOT_CONTENT = ("transformers_version", "auto_map")


def fingerprint(value: Any, values_per_tensor: int | None = None) -> str:
    """
    64 hexadecimal digits, the same for the same content in every process and on every device:

    - of numbers, texts, bytes, arrays, tensors and images, and of containers of such, all that they hold;
    - of modules the configuration and the weights ([`weights_fingerprint`]), of pipelines all components;
    - of tokenizers, processors, schedulers and configurations what they would save, but neither the folder that they
      were read from nor the version that wrote them;
    - of functions their code, defaults and closure; of other objects their class and what pickle would keep of them:
      a class with counters leaves them out in `__getstate__`.

    Every byte of weights is read, which takes seconds for each gigabyte (1.7 on one busy core), unless
    `values_per_tensor` says how many values of each tensor are looked at: enough to tell training from none.
    """
    return _sha256(json.dumps(_content(value, (), values_per_tensor)).encode())


def weights_fingerprint(module: nn.Module) -> str:
    """
    [`fingerprint`] of the names, shapes, types and values of a module's parameters and persistent buffers, offloaded
    ones included.
    """
    return _weights_fingerprint(module, None)


@torch.no_grad()
def _weights_fingerprint(module: nn.Module, values_per_tensor: int | None) -> str:
    return fingerprint(list(_weights("", module, values_per_tensor)))


def _weights(prefix: str, module: nn.Module, values_per_tensor: int | None) -> Iterator[Any]:
    with weights_in_place(module):
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if name not in module._non_persistent_buffers_set:
                yield prefix, name, _weight(tensor.detach(), values_per_tensor)
        if hasattr(module, "merged_adapters"):  # a layer of peft's: how much of its adapters counts is no weight
            yield prefix, module.scaling, module.active_adapters, module.disable_adapters
        for name, child in module.named_children():
            yield from _weights(f"{prefix}{name}.", child, values_per_tensor)


def _sha256(content: bytes | memoryview) -> str:
    return hashlib.sha256(content).hexdigest()


def _weight(tensor: torch.Tensor, num_values: int | None) -> list[Any]:
    described = [list(tensor.shape), str(tensor.dtype)]
    if hasattr(tensor, "__tensor_flatten__"):  # quantised or sharded: made of plain tensors
        names, _ = tensor.__tensor_flatten__()
        return [*described, *(_weight(getattr(tensor, name), num_values) for name in names)]
    if tensor.is_meta:
        return described
    if num_values is not None:
        tensor = tensor.flatten()[:: max(tensor.numel() // num_values, 1)]
    return [*described, _sha256(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)]


def _content(value: Any, holders: tuple[int, ...], num_values: int | None) -> Any:
    """`value` as what JSON can write; `holders` are the objects that it is a part of, which it may hold again."""
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if value is None or isinstance(value, bool | int | float | complex | str | Enum | torch.dtype | torch.device):
        return [kind, repr(value)]
    if isinstance(value, type | BuiltinFunctionType):
        return [kind, f"{value.__module__}.{value.__qualname__}"]
    if isinstance(value, bytes):
        return [kind, _sha256(value)]
    if isinstance(value, Image.Image):
        return ["image", value.mode, value.size, _sha256(value.tobytes())]
    if isinstance(value, np.ndarray | np.generic) and not value.dtype.hasobject:
        return ["array", str(value.dtype), value.shape, _sha256(value.tobytes())]
    if isinstance(value, torch.Tensor):
        return ["tensor", _weight(value.detach(), num_values)]
    if id(value) in holders:
        return [kind, "holds itself"]
    return [kind, _parts(value, (*holders, id(value)), num_values)]


def _parts(value: Any, holders: tuple[int, ...], num_values: int | None) -> Any:
    """What an object is made of."""

    def content(part: Any) -> Any:
        return _content(part, holders, num_values)

    if isinstance(value, Mapping):
        return sorted(([content(name), content(entry)] for name, entry in value.items()), key=repr)
    if isinstance(value, Set):
        return sorted(map(content, value), key=repr)
    if isinstance(value, Sequence):
        return [content(entry) for entry in value]
    return content(_state(value, num_values))


def _state(value: Any, num_values: int | None) -> Any:
    config = getattr(value, "config", None)
    if isinstance(value, nn.Module):
        # transformers keeps how a model generates apart from its configuration.
        settings = getattr(value, "generation_config", None)
        configs = [_saved(config), *([] if settings is None else [_saved(settings)])]
        return [*configs, _weights_fingerprint(value, num_values)]
    if isinstance(components := getattr(value, "components", None), Mapping):
        return [_saved(config), components]
    if isinstance(value, PreTrainedTokenizerFast):
        saved = json.loads(value.backend_tokenizer.to_str())
        return [saved | {"padding": None, "truncation": None}, value.chat_template]  # those are of the last call
    if isinstance(value, ProcessorMixin):
        return [_saved(value), {name: getattr(value, name) for name in value.get_attributes()}]
    if callable(getattr(value, "to_dict", None)) or isinstance(config, Mapping):
        return _saved(config if isinstance(config, Mapping) else value)
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]
        return [value.__qualname__, value.__code__, value.__defaults__, value.__kwdefaults__, cells]
    if isinstance(value, CodeType):
        return [value.co_code, value.co_names, value.co_consts]
    reduce = copyreg.dispatch_table.get(type(value), lambda value: value.__reduce_ex__(4))
    try:
        return reduce(value)[1:3]  # what it is made of, and what is then set
    except TypeError:  # not to be pickled
        return value.__getstate__()


def _saved(config: Any) -> Any:
    """A configuration's entries without those that say where it was read, who wrote it, and how it is found."""
    if callable(to_dict := getattr(config, "to_dict", None)):
        config = to_dict()
    if isinstance(config, Mapping):
        own = [name for name in config if not str(name).startswith("_") and name not in NOT_CONTENT]
        return {name: _saved(config[name]) for name in own}
    return [_saved(entry) for entry in config] if isinstance(config, list | tuple) else config


__all__ = ["fingerprint", "weights_fingerprint"]
