"""The decoder's condition, which the steps of one decoding need not compute anew."""

from collections.abc import Iterable

import torch
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
from torch import nn

from .module_sharing import shallow_copy


class _RememberedOutput(nn.Module):
    """Modules one after the other, which run once; from then on it answers with what they gave, whatever the input."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        super().__init__()
        self.chain = nn.ModuleList(modules)
        self.output: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor, *args) -> torch.Tensor:
        if self.output is None:
            for module in self.chain:
                hidden_states = module(hidden_states, *args)
            self.output = hidden_states
        return self.output


def with_remembered_condition(transformer: ZImageTransformer2DModel) -> ZImageTransformer2DModel:
    r"""
    A copy of the decoder, of the same weights, that computes its condition once: for the steps of one decoding.

    `cap_embedder` and `context_refiner` see the features only and not the time, so what they gave at the first step is
    what they would give at every other, bit for bit. The copy holds it: two tensors `(rows, features, dim)`.
    """
    return shallow_copy(
        transformer,
        cap_embedder=_RememberedOutput([transformer.cap_embedder]),
        context_refiner=nn.ModuleList([_RememberedOutput(transformer.context_refiner)]),
    )


def forget_condition(transformer: ZImageTransformer2DModel) -> None:
    """What [`with_remembered_condition`] made computes its condition again: the features may have changed."""
    for module in transformer.modules():
        if isinstance(module, _RememberedOutput):
            module.output = None
