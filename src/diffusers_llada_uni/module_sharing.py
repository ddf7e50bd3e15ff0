"""Copies of a module that share its weights: what is changed in one, other threads and pipelines do not see."""

import copy
import types
from typing import Any, TypeVar

from torch import nn


Module = TypeVar("Module", bound=nn.Module)


def is_hooked(module: nn.Module) -> bool:
    """Whether it or a module in it is under hooks of diffusers, as of group offloading."""
    registries = (getattr(part, "_diffusers_hook", None) for part in module.modules())
    return any(registry is not None and registry.hooks for registry in registries)


def is_replaced(module: nn.Module) -> bool:
    """Whether somebody gave it another `forward` than its class's. What accelerate puts around it does not count."""
    forward = vars(module).get("_old_forward" if hasattr(module, "_hf_hook") else "forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


class _HookOf:
    """accelerate's hook of a module, for a copy of it: what it brings in and takes away is the module's."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def pre_forward(self, copied: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict[str, Any]]:
        return vars(self.module)["_hf_hook"].pre_forward(self.module, *args, **kwargs)

    def post_forward(self, copied: nn.Module, output: Any) -> Any:
        return vars(self.module)["_hf_hook"].post_forward(self.module, output)


def shallow_copy(module: Module, /, **children: nn.Module) -> Module:
    r"""
    A module of the same class, settings and weights, and of the same children but for those that are given. Calling it
    is calling the other one, through accelerate's hook if there is one; only it is not compiled.

    Args:
        module (`nn.Module`): Neither [`is_hooked`] itself nor [`is_replaced`].
        children (`nn.Module`): By their names.
    """
    copied = copy.copy(module)  # shares the dicts of parameters and buffers
    copied._modules = {**module._modules, **children}
    for name in ("forward", "_old_forward", "_hf_hook", "_diffusers_hook"):
        vars(copied).pop(name, None)  # these know the other module
    if hasattr(module, "_hf_hook"):
        hook, old_forward = _HookOf(module), types.MethodType(type(module).forward, copied)
        vars(copied).update(_hf_hook=hook, _old_forward=old_forward)

        def forward(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = hook.pre_forward(copied, *args, **kwargs)
            return hook.post_forward(copied, old_forward(*args, **kwargs))

        copied.forward = forward
    return copied
