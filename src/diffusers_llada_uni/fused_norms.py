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
        weight = self.norm.weight
        if weight is None or hidden_states.dtype != weight.dtype:
            return self.norm(hidden_states)
        return F.rms_norm(hidden_states, self.norm.dim, weight, self.norm.eps)


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
    fused = {name: _fused(child) for name, child in module.named_children()}
    changed = {name: child for name, child in fused.items() if child is not module._modules[name]}
    return shallow_copy(module, **changed) if changed else module


def _fused(module: nn.Module) -> nn.Module:
    """A norm of diffusers as the fused one, if it fits; everything else as [`with_fused_norms`] leaves it."""
    if not isinstance(module, RMSNorm):
        return with_fused_norms(module)
    fits = module.weight is not None and module.weight.dtype.itemsize == 2 and module.bias is None
    is_changed = is_replaced(module) or module._compiled_call_impl is not None or hasattr(module, "_hf_hook")
    return _FusedRMSNorm(module) if fits and not is_changed else module
