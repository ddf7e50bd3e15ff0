"""RMSNorm and the gate of an MLP give what the model's own modules give."""

import pytest
import torch
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeMLP, Glm4MoeRMSNorm

from tests.transformers_llada_uni.kernels.common import DEVICE, DTYPES, assert_equal_but_for_rounding, random
from transformers_llada_uni import LLaDA2MoeConfig
from transformers_llada_uni.kernels.normalization import rms_norm, silu_multiply


pytestmark = pytest.mark.parametrize("dtype", DTYPES)


def norm(size: int, dtype: torch.dtype) -> Glm4MoeRMSNorm:
    module = Glm4MoeRMSNorm(size, eps=1e-6)
    module.weight = torch.nn.Parameter(1 + random(size, seed=7, scale=0.2), requires_grad=False)
    return module.to(DEVICE, dtype)


@pytest.mark.parametrize("shape", [(1, 2048), (3, 64), (2, 5, 48), (17,), (0, 64)])
# So small that `eps` counts, so large that squares leave float16.
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_rms_norm(dtype, shape, scale):
    module = norm(shape[-1], dtype)
    hidden = random(*shape, dtype=dtype, scale=scale)
    found = rms_norm(hidden, module.weight, 1e-6)
    assert found.dtype == dtype
    assert_equal_but_for_rounding(found, module(hidden))


@pytest.mark.parametrize("shape", [(3, 64), (2, 5, 48)])
def test_rms_norm_of_a_sum(dtype, shape):
    module = norm(shape[-1], dtype)
    hidden, residual = random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1, scale=30.0)
    normed, total = rms_norm(hidden, module.weight, 1e-6, residual)
    assert torch.equal(total, residual + hidden)
    assert_equal_but_for_rounding(normed, module(residual + hidden))


def test_rms_norm_of_another_layout(dtype):
    module = norm(48, dtype)
    hidden, residual = random(5, 48, 2, dtype=dtype).transpose(1, 2), random(2, 5, 48, dtype=dtype).transpose(0, 1)
    normed, total = rms_norm(hidden, module.weight, 1e-6, residual)
    assert torch.equal(total, residual + hidden)
    assert_equal_but_for_rounding(normed, module(residual + hidden))


def test_rms_norm_refuses_what_does_not_fit(dtype):
    hidden = random(2, 48, dtype=dtype)
    for call in (
        lambda: rms_norm(hidden, hidden[0, 1:], 1e-6),
        lambda: rms_norm(hidden, hidden[0].double(), 1e-6),
        lambda: rms_norm(hidden, hidden[0], 1e-6, hidden[:1]),
    ):
        with pytest.raises(AssertionError):
            call()


@pytest.mark.parametrize("size", [32, 37, 1500])
def test_silu_multiply(dtype, size):
    act_fn = Glm4MoeMLP(LLaDA2MoeConfig(hidden_size=8, intermediate_size=8)).act_fn
    together = random(2, 3, 2 * size, dtype=dtype, scale=3.0)
    for gate, up in (
        together.chunk(2, dim=-1),
        random(2, 3, 5, size, dtype=dtype),
        random(2, size, 3, dtype=dtype).mT,
    ):
        found = silu_multiply(gate, up)
        assert found.is_contiguous() and found.dtype == dtype
        assert_equal_but_for_rounding(found, act_fn(gate) * up, roundings=4)


def test_silu_multiply_refuses_what_does_not_fit(dtype):
    with pytest.raises(AssertionError):
        silu_multiply(random(2, 3, dtype=dtype), random(3, 2, dtype=dtype))
