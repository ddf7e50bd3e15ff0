"""What keeps the fused kernels away, each on its own."""

import pytest
import torch
from torch import nn

from transformers_llada_uni import kernels
from transformers_llada_uni.kernels import can_fuse, fused_operations


@pytest.fixture(autouse=True)
def on_a_kernel_device(monkeypatch):
    monkeypatch.setattr(kernels, "is_kernel_device", lambda device: True)
    with torch.no_grad():
        yield


def weight(dtype: torch.dtype = torch.float32, device: str = "cpu") -> nn.Parameter:
    return nn.Parameter(torch.zeros(4, dtype=dtype, device=device))


STATES = torch.zeros(2, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_does(dtype):
    assert can_fuse(STATES.to(dtype))
    assert can_fuse(STATES.to(dtype), weight(dtype))


@pytest.mark.parametrize(
    "states, of_weight",
    [
        (STATES.double(), None),
        (nn.Parameter(STATES), None),
        (STATES.double(), weight(torch.float64)),
        (STATES, weight(torch.bfloat16)),
        (STATES, weight(device="meta")),
        (STATES, torch.zeros(4)),
    ],
    ids=["a type", "a subclass", "a type of both", "types that differ", "another device", "no parameter"],
)
def test_the_tensors_do(states, of_weight):
    assert not can_fuse(states, of_weight)


def test_the_process_does(monkeypatch):
    with fused_operations(False):
        assert not can_fuse(STATES)
    assert can_fuse(STATES)
    with torch.enable_grad():
        assert not can_fuse(STATES)
    with monkeypatch.context() as patched:
        patched.setattr(torch.compiler, "is_compiling", lambda: True)
        assert not can_fuse(STATES)
    monkeypatch.setattr(kernels, "is_kernel_device", lambda device: False)
    assert can_fuse(STATES) == (kernels.IS_INTERPRETED and kernels.HAS_TRITON)
