"""What one decoding need not compute at every step: the decoder's condition."""

from types import TracebackType

import torch
from diffusers import ZImageTransformer2DModel
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.utils.torch_utils import is_compiled_module
from torch import nn


_CONDITION_HOOK = "llada_uni_condition"


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

    The condition is computed at every step, as without the cache, where its modules may not be skipped: under hooks of
    diffusers (with group offloading each module brings in the weights of the next) and compiled (a hook per picture
    would compile anew for each).

    Args:
        transformer ([`ZImageTransformer2DModel`]): The decoder.
    """

    def __init__(self, transformer: ZImageTransformer2DModel) -> None:
        modules = [transformer.cap_embedder, *transformer.context_refiner]
        parts = [part for module in modules for part in module.modules()]
        is_hooked = any(part._diffusers_hook.hooks for part in parts if hasattr(part, "_diffusers_hook"))
        is_compiled = is_compiled_module(transformer) or any(
            part._compiled_call_impl is not None for part in [transformer, *parts]
        )
        self._hooks = [] if is_hooked or is_compiled else [(module, _RememberedOutput()) for module in modules]

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
