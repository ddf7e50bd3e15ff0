"""RMSNorm in one pass over memory instead of seven."""

from typing import TypeVar

import torch
import torch.nn.functional as F
from diffusers.models.normalization import RMSNorm
from torch import nn

from .module_sharing import is_replaced, shallow_copy


Module = TypeVar("Module", bound=nn.Module)


class _FusedRMSNorm(nn.Module):
    """Rounds once, after the product with the weight; diffusers' norm rounds before it, too."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.dtype != self.norm.weight.dtype:
            return self.norm(hidden_states)
        return F.rms_norm(hidden_states, self.norm.dim, self.norm.weight, self.norm.eps)


def with_fused_norms(module: Module) -> Module:
    r"""
    A copy of a module, of the same weights, whose diffusers `RMSNorm`s of half precision are torch's fused ones; the
    module itself, where it has none. More than half of what a block of the decoder reads and writes besides its matrix
    products is diffusers' norms, which put every intermediate result in memory, in float32.

    What is compiled (and so fused already), offloaded by accelerate or given another `forward` is left as it is.

    Args:
        module (`nn.Module`): Without hooks of diffusers.
    """
    if is_replaced(module) or module._compiled_call_impl is not None:
        return module
    if type(module) is RMSNorm:
        fits = module.weight is not None and module.weight.dtype.itemsize == 2 and module.bias is None
        return _FusedRMSNorm(module) if fits and not hasattr(module, "_hf_hook") else module
    fused = {name: with_fused_norms(child) for name, child in module.named_children()}
    changed = {name: child for name, child in fused.items() if child is not module._modules[name]}
    return shallow_copy(module, **changed) if changed else module
