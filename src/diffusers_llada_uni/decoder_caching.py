"""What the steps of one decoding need not compute anew: the decoder's condition and, not exact, most of its blocks."""

from collections.abc import Iterable

import torch
from diffusers import ZImageTransformer2DModel
from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache
from diffusers.utils.torch_utils import is_compiled_module
from torch import nn

from .module_sharing import is_hooked, is_replaced, shallow_copy


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


def may_skip_blocks(transformer: ZImageTransformer2DModel) -> bool:
    """Whether blocks may be skipped: nobody else has hooks in the decoder, compiled it or replaced a `forward`."""
    parts = [transformer, *transformer.layers]
    is_compiled = is_compiled_module(transformer) or any(part._compiled_call_impl is not None for part in parts)
    return not is_compiled and not is_hooked(transformer) and not any(is_replaced(part) for part in parts)


def with_first_block_cache(
    transformer: ZImageTransformer2DModel, config: FirstBlockCacheConfig
) -> ZImageTransformer2DModel:
    r"""
    A copy of the decoder, of the same weights, under diffusers' first block cache: for the steps of one decoding, and
    to be called inside of `CacheMixin.cache_context(copy, name)`.

    diffusers has the cache, but not for this decoder: `ZImageTransformer2DModel` is no `CacheMixin`, and the entry of
    its block in diffusers' registry does not say that the block calls its hidden states `x`.

    Args:
        transformer ([`ZImageTransformer2DModel`]): The decoder, where [`may_skip_blocks`]. Of one block it is a copy
            without the cache, as there is none to skip.
        config ([`FirstBlockCacheConfig`]): How small a change of the first block's residual, relative to the last step
            that ran all blocks, lets the others be skipped. It is averaged over all rows of a call.
    """
    # The hooks change the modules that they are registered with, so the blocks too are copies.
    copied = shallow_copy(transformer, layers=nn.ModuleList(shallow_copy(block) for block in transformer.layers))
    if len(transformer.layers) < 2:
        return copied
    # Private to diffusers, and so imported only by who asks for this cache.
    from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry

    hidden_states_first = TransformerBlockMetadata(
        return_hidden_states_index=0,
        hidden_states_argument_name="x",
        _cached_parameter_indices={"x": 0, "hidden_states": 0},
    )
    TransformerBlockRegistry.register(type(transformer.layers[0]), hidden_states_first)
    apply_first_block_cache(copied, config)
    return copied
