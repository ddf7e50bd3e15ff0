"""The compiled loop over pairs of token and expert gives what transformers' own implementations give."""

import shutil

import pytest
import torch
from transformers.integrations.moe import grouped_mm_experts_forward
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeExperts

from transformers_llada_uni import LLaDA2MoeConfig, experts_fused_gather
from transformers_llada_uni.experts_fused_gather import fused_gather_experts_forward


pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
NUM_EXPERTS, HIDDEN_SIZE, TOP_K = 8, 24, 3  # 24 is no multiple of a vector's length


@pytest.fixture(scope="module")
def experts() -> Glm4MoeExperts:
    torch.manual_seed(0)
    config = LLaDA2MoeConfig(
        hidden_size=HIDDEN_SIZE,
        moe_intermediate_size=12,
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=TOP_K,
        n_group=1,
        topk_group=1,
    )
    experts = Glm4MoeExperts(config)
    for weight in experts.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return experts.requires_grad_(False)


def tokens(num_tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    states = torch.randn(num_tokens, HIDDEN_SIZE, generator=generator, dtype=dtype)
    weights, indices = torch.rand(num_tokens, NUM_EXPERTS, generator=generator).topk(TOP_K)
    return states, indices, weights.to(dtype)


@pytest.fixture
def refuse_grouped_mm(monkeypatch):
    def refuse(*_):
        raise AssertionError("fell back to grouped_mm")

    monkeypatch.setattr(experts_fused_gather, "grouped_mm_experts_forward", refuse)


@torch.no_grad()
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_loop_over_experts(experts, refuse_grouped_mm, num_tokens, dtype):
    inputs = tokens(num_tokens, dtype)
    experts = experts.to(dtype)
    wanted = Glm4MoeExperts.forward.__wrapped__(experts, *inputs)
    torch.testing.assert_close(fused_gather_experts_forward(experts, *inputs), wanted)


@torch.no_grad()
def test_half_precision_sums_in_float32(experts, refuse_grouped_mm):
    inputs = tokens(16, torch.bfloat16)
    wanted = Glm4MoeExperts.forward.__wrapped__(
        experts.float(), *(t.float() if t.is_floating_point() else t for t in inputs)
    )
    found = fused_gather_experts_forward(experts.bfloat16(), *inputs)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), wanted, rtol=0.05, atol=0.05)


@torch.no_grad()
def test_a_token_gets_the_same_bits_in_any_company(experts, refuse_grouped_mm):
    experts = experts.float()
    states, indices, weights = tokens(20, torch.float32)
    together = fused_gather_experts_forward(experts, states, indices, weights)
    for row in range(len(states)):
        alone = fused_gather_experts_forward(
            experts, *(tensor[row : row + 1] for tensor in (states, indices, weights))
        )
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("reason", ["many tokens", "gradients", "expert parallelism", "no tokens"])
def test_leaves_to_grouped_mm_what_it_does_better(experts, monkeypatch, reason):
    calls = []
    monkeypatch.setattr(
        experts_fused_gather,
        "grouped_mm_experts_forward",
        lambda *args: calls.append(args) or grouped_mm_experts_forward(*args),
    )
    experts = experts.float()
    limit = experts_fused_gather.MAX_TOKENS_PER_EXPERT[torch.float32] * NUM_EXPERTS // TOP_K
    inputs = tokens({"many tokens": limit + 1, "no tokens": 0}.get(reason, limit), torch.float32)
    if reason == "expert parallelism":
        monkeypatch.setattr(experts, "_is_expert_parallel", True)
    with torch.set_grad_enabled(reason == "gradients"):
        found = fused_gather_experts_forward(experts, *inputs)
    assert len(calls) == 1
    torch.testing.assert_close(found, Glm4MoeExperts.forward.__wrapped__(experts, *inputs))
