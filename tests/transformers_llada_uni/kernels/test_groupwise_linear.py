"""The product with a weight in few bits gives what the plain weight gives."""

from unittest import mock

import pytest
import torch

from tests.transformers_llada_uni.kernels.common import DEVICE, DTYPES, random
from transformers_llada_uni import LLaDA2MoeConfig
from transformers_llada_uni.kernels import groupwise_linear as kernel
from transformers_llada_uni.kernels.expert_weights import quantize_experts
from transformers_llada_uni.kernels.groupwise_linear import groupwise_linear
from transformers_llada_uni.kernels.groupwise_modules import GroupwiseExperts, GroupwiseLinear


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize(
    ("rows", "in_features", "out_features", "group_size"),
    [(1, 64, 16, 16), (5, 128, 48, 64), (17, 96, 70, 16), (70, 256, 32, 128), (0, 64, 16, 32)],
)
def test_product(dtype, kind, rows, in_features, out_features, group_size):
    weights = quantize_experts(random(1, out_features, in_features, dtype=dtype, seed=1), kind, group_size)
    states = random(rows, in_features, dtype=dtype)
    found = groupwise_linear(states, weights)
    wanted = states.double() @ weights.dequantize(torch.float64)[0].T
    assert found.dtype == dtype and found.shape == (rows, out_features)
    tolerance = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance * in_features**0.5)


def test_states_of_another_layout():
    weights = quantize_experts(random(1, 32, 64), "int4", 32)
    states = random(64, 3).T
    assert torch.equal(groupwise_linear(states, weights), groupwise_linear(states.contiguous(), weights))


def test_refuses_what_does_not_fit():
    weights = quantize_experts(random(1, 32, 64), "int4", 32)
    for call in (
        lambda: groupwise_linear(random(3, 32), weights),
        lambda: groupwise_linear(random(3, 64), quantize_experts(random(2, 32, 64), "int8", 32)),
        lambda: groupwise_linear(random(3, 64), quantize_experts(random(1, 32, 64), "plain")),
    ):
        with pytest.raises(AssertionError):
            call()


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_modules_go_by_the_kernels_without_gradients(kind):
    config = LLaDA2MoeConfig(
        hidden_size=64, moe_intermediate_size=32, num_experts=8, n_group=1, topk_group=1, num_experts_per_tok=2
    )
    linear, experts = GroupwiseLinear(64, 48, kind, 16), GroupwiseExperts(config, kind, 16)
    for module in (linear, experts):
        for seed, name in enumerate(module.weight_names):
            weight = random(*module.plain_shape(name), seed=seed, scale=0.1)
            for own_name, tensor in module.quantize(name, weight).items():
                setattr(module, own_name, torch.nn.Parameter(tensor, requires_grad=False))
    states = random(2, 5, 64)
    tokens = states.flatten(0, 1)
    index = torch.arange(20, device=DEVICE).view(10, 2) % 8
    factors = random(10, 2, seed=5).sigmoid()
    wanted = linear(states), experts(tokens, index, factors, addend=tokens)
    with torch.no_grad():
        assert linear.can_use_kernel(states) and experts.can_use_kernel(tokens)
        with mock.patch.object(kernel, "groupwise_linear", wraps=groupwise_linear) as used:
            found = linear(states), experts(tokens, index, factors, addend=tokens)
        assert used.call_count == 1
        with mock.patch.object(kernel, "MAX_ROWS", 9):
            of_many_rows = linear(states)
    for pair in zip((*found, of_many_rows), (*wanted, wanted[0]), strict=True):
        torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-5)
    assert torch.equal(of_many_rows, wanted[0])
