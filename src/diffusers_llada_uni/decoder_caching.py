"""What one decoding need not compute at every step: the decoder's condition and, not exact, most of its blocks."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType

import torch
from diffusers import ZImageTransformer2DModel
from diffusers.hooks import FirstBlockCacheConfig, HookRegistry, ModelHook, apply_first_block_cache
from diffusers.models import CacheMixin
from diffusers.utils.torch_utils import is_compiled_module
from torch import nn


_CONDITION_HOOK = "llada_uni_condition"


def may_skip(transformer: ZImageTransformer2DModel, modules: Iterable[nn.Module]) -> bool:
    r"""
    Whether hooks of ours may skip these modules of the decoder for the time of one decoding.

    Not under other hooks of diffusers (with group offloading each module brings in the weights of the next), and not
    where compiled (hooks that come and go compile anew for each picture).
    """
    parts = [part for module in modules for part in module.modules()]
    is_hooked = any(part._diffusers_hook.hooks for part in parts if hasattr(part, "_diffusers_hook"))
    is_compiled = is_compiled_module(transformer) or any(
        part._compiled_call_impl is not None for part in [transformer, *parts]
    )
    return not is_hooked and not is_compiled


class _RememberedOutput(ModelHook):
    """Runs the module once; then answers with what it gave, whatever the input."""

    def __init__(self) -> None:
        super().__init__()
        self.output: torch.Tensor | None = None

    def new_forward(self, module: nn.Module, *args, **kwargs) -> torch.Tensor:
        if self.output is None:
            self.output = self.fn_ref.original_forward(*args, **kwargs)
        return self.output


class ConditionCache:
    r"""
    Computes the condition of a `ZImageTransformer2DModel`, which does not depend on the time, once for all steps.

    `cap_embedder` and `context_refiner` see the features only, so what they gave at the first step is what they would
    give at every other, bit for bit. Inside `with cache:` they answer with it; outside the decoder is as it was, so a
    callback may use it for something else.

        cache = ConditionCache(transformer)
        for step in steps:
            with cache:
                transformer(...)  # the same features at every step, or `cache.forget()` in between

    Holds a tensor `(batch, features, dim)` for `cap_embedder` and each block of `context_refiner`.

    Where its modules may not be skipped ([`may_skip`]) the condition is computed at every step, as without the cache.

    Args:
        transformer ([`ZImageTransformer2DModel`]): The decoder.
    """

    def __init__(self, transformer: ZImageTransformer2DModel) -> None:
        modules = [transformer.cap_embedder, *transformer.context_refiner]
        is_skipped = may_skip(transformer, modules)
        self._hooks = [(module, _RememberedOutput()) for module in modules] if is_skipped else []

    def forget(self) -> None:
        """The next step computes the condition: the features may have changed, or there are no more steps."""
        for _, hook in self._hooks:
            hook.output = None

    def __enter__(self) -> "ConditionCache":
        for module, hook in self._hooks:
            HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, _CONDITION_HOOK)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for module, _ in self._hooks:
            HookRegistry.check_if_exists_or_initialize(module).remove_hook(_CONDITION_HOOK, recurse=False)


@contextmanager
def first_block_cache(transformer: ZImageTransformer2DModel, config: FirstBlockCacheConfig | None) -> Iterator[None]:
    r"""
    diffusers' first block cache in a decoder, for the time of one decoding; nothing without a `config`.

    diffusers has the cache, but not for this decoder: `ZImageTransformer2DModel` is no `CacheMixin`, and the entry of
    its block in diffusers' registry does not say that the block calls its hidden states `x`. The hooks go at the end,
    and with them what they remember: nothing is left for the next picture.

    Args:
        transformer ([`ZImageTransformer2DModel`]): The decoder. It needs a second block for there to be any to skip.
        config ([`FirstBlockCacheConfig`], *optional*): How small a change of the first block's residual, relative to
            the last step that ran all blocks, lets the others be skipped. It is averaged over the whole batch.
    """
    if config is None or len(transformer.layers) < 2:
        yield
        return
    # Private to diffusers, and so imported only by who asks for this cache.
    from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
    from diffusers.hooks.first_block_cache import _FBC_BLOCK_HOOK, _FBC_LEADER_BLOCK_HOOK

    hidden_states_first = TransformerBlockMetadata(
        return_hidden_states_index=0,
        hidden_states_argument_name="x",
        _cached_parameter_indices={"x": 0, "hidden_states": 0},
    )
    TransformerBlockRegistry.register(type(transformer.layers[0]), hidden_states_first)
    registry = HookRegistry.check_if_exists_or_initialize(transformer)
    try:
        apply_first_block_cache(transformer, config)
        registry.invalidate_child_registries_cache()
        with CacheMixin.cache_context(transformer, "decoding"):
            yield
    finally:
        for name in (_FBC_LEADER_BLOCK_HOOK, _FBC_BLOCK_HOOK):
            registry.remove_hook(name, recurse=True)
        registry.invalidate_child_registries_cache()
