"""Hooks of a module, and offloaded weights that are read without calling it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn
from transformers.utils import output_capturing


def is_hooked(module: nn.Module) -> bool:
    """Whether calling it does more than its `forward`: hooks of its own, of accelerate or of diffusers."""
    hooks = [
        hook
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        # transformers leaves those behind once hidden states were asked for; they do nothing by themselves.
        if getattr(hook, "__module__", None) != output_capturing.__name__
    ]
    of_diffusers = getattr(getattr(module, "_diffusers_hook", None), "hooks", None)
    return bool(hooks or of_diffusers or hasattr(module, "_hf_hook"))


@contextmanager
def weights_in_place(*modules: nn.Module) -> Iterator[None]:
    """
    Hooks of accelerate and diffusers bring a module's weights in when it is called, and take them away afterwards.
    Inside of this context they are in place without a call; there the module's attributes must be read anew.
    """
    with ExitStack() as stack:
        for module in modules:
            for hook in _hooks_of(module):
                hook.pre_forward(module)
                stack.callback(hook.post_forward, module, None)
        yield


def _hooks_of(module: nn.Module) -> list:
    """In the order in which a call goes through them."""
    accelerate_hook = getattr(module, "_hf_hook", None)
    registry = getattr(module, "_diffusers_hook", None)
    hooks = [] if registry is None else list(reversed(registry.hooks.values()))
    return hooks if accelerate_hook is None else [*hooks, accelerate_hook]
