"""The router's two kernels choose and weigh experts as the model's own router does."""

import pytest
import torch

from tests.transformers_llada_uni.kernels.common import DEVICE, DTYPES, random
from transformers_llada_uni import LLaDA2MoeConfig
from transformers_llada_uni.kernels import fused_operations
from transformers_llada_uni.kernels.router import choose_experts, router_logits
from transformers_llada_uni.modeling_llada2_moe import LLaDA2MoeTopkRouter


# Experts, groups, groups kept, top k
CHOICES = [(16, 4, 2, 4), (256, 8, 4, 8), (12, 3, 2, 3), (15, 3, 1, 5), (8, 1, 1, 2), (8, 4, 4, 1)]


def router(experts: int, groups: int, kept: int, top_k: int) -> LLaDA2MoeTopkRouter:
    config = LLaDA2MoeConfig(
        hidden_size=48,
        num_experts=experts,
        n_group=groups,
        topk_group=kept,
        num_experts_per_tok=top_k,
        routed_scaling_factor=2.5,
    )
    module = LLaDA2MoeTopkRouter(config).requires_grad_(False)
    module.weight.copy_(random(experts, 48, seed=experts, scale=0.3))
    module.expert_bias.copy_(random(experts, seed=top_k, scale=0.3))
    return module.to(DEVICE)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("tokens", [1, 6])
def test_equals_the_router(choice, tokens):
    module, hidden = router(*choice), random(tokens, 48)
    with fused_operations(False):
        wanted_logits, wanted_weights, wanted_index = module(hidden)
    logits = router_logits(hidden, module.weight)
    torch.testing.assert_close(logits, wanted_logits, rtol=1e-5, atol=1e-5)
    weights, index = choose_experts(logits, module.expert_bias, *choice[1:], 2.5)
    assert weights.dtype == torch.float32 and index.dtype == torch.int64
    # The order of the chosen is nobody's business.
    by_expert, wanted_by_expert = index.argsort(dim=-1), wanted_index.argsort(dim=-1)
    assert torch.equal(index.gather(-1, by_expert), wanted_index.gather(-1, wanted_by_expert))
    torch.testing.assert_close(weights.gather(-1, by_expert), wanted_weights.gather(-1, wanted_by_expert))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 16, 64), (17, 40, 100), (300, 48, 64)])
def test_logits_are_summed_in_float32(dtype, shape):
    tokens, experts, hidden_size = shape
    hidden, weight = random(tokens, hidden_size, dtype=dtype), random(experts, hidden_size, dtype=dtype, seed=1)
    found = router_logits(hidden, weight)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), hidden.double() @ weight.double().T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("choice", CHOICES)
def test_of_equals_the_first_are_taken(choice):
    experts, _, _, top_k = choice
    weights, index = choose_experts(
        torch.zeros(2, experts, device=DEVICE), torch.zeros(experts, device=DEVICE), *choice[1:], 2.5
    )
    assert torch.equal(index, torch.arange(top_k, device=DEVICE).expand(2, -1))
    torch.testing.assert_close(weights, torch.full_like(weights, 2.5 / top_k))


def test_bias_chooses_but_does_not_weigh():
    logits, bias = torch.zeros(1, 16, device=DEVICE), torch.zeros(16, device=DEVICE)
    logits[0, 2], bias[9] = 3.0, 5.0
    weights, index = choose_experts(logits, bias, 4, 2, 4, 1.0)
    assert index.tolist() == [[9, 2, 0, 1]]
    scores = logits[0, index[0]].sigmoid()
    torch.testing.assert_close(weights[0], scores / scores.sum())


def test_tokens_that_are_not_numbers_stay_among_themselves():
    logits = random(3, 12)
    wanted_weights, wanted_index = choose_experts(logits, torch.zeros(12, device=DEVICE), 3, 2, 3, 1.0)
    logits[1] = float("nan")
    weights, index = choose_experts(logits, torch.zeros(12, device=DEVICE), 3, 2, 3, 1.0)
    assert bool(weights[1].isnan().all() and (index[1] >= 0).all() and (index[1] < 12).all())
    for row in (0, 2):
        assert torch.equal(weights[row], wanted_weights[row]) and torch.equal(index[row], wanted_index[row])


def test_no_tokens():
    logits = router_logits(random(0, 32), random(8, 32))
    weights, index = choose_experts(logits, torch.zeros(8, device=DEVICE), 2, 1, 2, 1.0)
    assert weights.shape == index.shape == (0, 2)


def test_refuses_what_does_not_fit():
    logits, bias = torch.zeros(2, 12, device=DEVICE), torch.zeros(12, device=DEVICE)
    for call in (
        lambda: router_logits(random(2, 32), random(12, 31)),
        lambda: router_logits(random(32, 2).T, random(12, 32)),
        lambda: choose_experts(logits.double(), bias, 3, 2, 3, 1.0),
        lambda: choose_experts(logits, bias[1:], 3, 2, 3, 1.0),
        lambda: choose_experts(logits, bias, 5, 2, 3, 1.0),
        lambda: choose_experts(logits, bias, 12, 2, 3, 1.0),
        lambda: choose_experts(logits, bias, 3, 2, 9, 1.0),
    ):
        with pytest.raises(AssertionError):
            call()
