"""
Where kernels are tested, and in which types: on a GPU in all; else in Triton's interpreter, which is right in float32
only and must be chosen before Triton is imported, so in a process of its own (`test_small_kernels.py` starts it).
"""

import importlib.util
import os

import pytest
import torch


IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
if not (IS_INTERPRETED or torch.cuda.is_available()):
    pytest.skip("no GPU; runs in Triton's interpreter, from `test_small_kernels.py`", allow_module_level=True)

DEVICE = "cpu" if IS_INTERPRETED else "cuda"
DTYPES = [torch.float32] if IS_INTERPRETED else [torch.float32, torch.bfloat16, torch.float16]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(DEVICE, dtype)


def assert_equal_but_for_rounding(
    found: torch.Tensor, wanted: torch.Tensor, roundings: float = 2.0, atol: float = 0.0
) -> None:
    """Within so many roundings of `found`'s dtype of `wanted`; in float32 3e-6 at least, for sums of another order."""
    tolerance = max(roundings * torch.finfo(found.dtype).eps, 3e-6)
    assert found.shape == wanted.shape
    torch.testing.assert_close(found.double(), wanted.double(), rtol=tolerance, atol=tolerance + atol)
