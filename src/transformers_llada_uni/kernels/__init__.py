"""
Kernels: what the model computes, in fewer launches. They take tensors and know neither modules nor generation.
Routed experts (`experts_*`, `expert_*`) alone also come as transformers' interface, `experts_triton`.

The Triton modules are imported by who calls them, as torch's builds for CPUs come without Triton.
"""

import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # that the kernels know
HAS_TRITON = importlib.util.find_spec("triton") is not None  # asked here: a graph that is being compiled cannot ask
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # in tests, on a CPU

_is_fused = True


@contextmanager
def fused_operations(enabled: bool) -> Iterator[None]:
    """Switches the fused kernels of the whole process on or off for the time of a `with` block, to measure them."""
    global _is_fused
    before, _is_fused = _is_fused, enabled
    try:
        yield
    finally:
        _is_fused = before


def is_fused() -> bool:
    """Whether fused kernels are used where they can be."""
    return _is_fused


@functools.cache
def is_kernel_device(device: torch.device) -> bool:
    """Whether Triton's kernels run there: on cards of CUDA from Ampere on."""
    # ROCm's devices are called "cuda" too; nobody has tried them.
    is_cuda = device.type == "cuda" and torch.version.hip is None and HAS_TRITON
    return is_cuda and torch.cuda.get_device_capability(device) >= (8, 0)


def has_grouped_mm_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's grouped product has a kernel, and not a loop that the host steers by values of tensors."""
    if device.type != "cuda":
        return True  # nothing there is recorded
    return dtype == torch.bfloat16 and torch.cuda.get_device_capability(device)[0] in (9, 10)


def can_fuse(states: torch.Tensor, weight: torch.Tensor | None = None) -> bool:
    """
    Whether Triton's kernels can compute with these: plain tensors on a GPU of CUDA (or in Triton's interpreter, which
    tests use), of one type that they know, without gradients, and not where `torch.compile` fuses by itself.
    """
    if not _is_fused or torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    if not (is_kernel_device(states.device) or (IS_INTERPRETED and HAS_TRITON)):
        return False
    if states.is_cuda and states.device.index != torch.cuda.current_device():
        return False  # Triton launches where the process works at the moment
    is_known = states.dtype in DTYPES
    is_plain = type(states) is torch.Tensor
    if weight is not None:
        is_known = is_known and states.dtype == weight.dtype
        is_plain = is_plain and type(weight) is torch.nn.Parameter and states.device == weight.device
    return is_known and is_plain
