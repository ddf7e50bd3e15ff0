"""The compiled loop over pairs of token and expert gives what transformers' own implementations give."""

import shutil

import pytest
import torch
from transformers import GptOssConfig
from transformers.integrations.moe import grouped_mm_experts_forward
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeExperts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.utils import is_torch_greater_or_equal

from transformers_llada_uni import LLaDA2MoeConfig
from transformers_llada_uni.kernels import experts_fused_gather
from transformers_llada_uni.kernels.experts_fused_gather import fused_gather_experts_forward, linear_of_expert


pytestmark = [
    pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU"),
    pytest.mark.skipif(not is_torch_greater_or_equal("2.13"), reason="needs torch 2.13"),
]
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
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(experts, refuse_grouped_mm, dtype):
    inputs = tokens(16, dtype)
    wanted = Glm4MoeExperts.forward.__wrapped__(
        experts.float(), *(t.float() if t.is_floating_point() else t for t in inputs)
    )
    found = fused_gather_experts_forward(experts.to(dtype), inputs[0], inputs[1], inputs[2].float())
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), wanted, rtol=0.05, atol=0.05)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_in_float32(dtype):
    """Behind so large a first term, a sum that is rounded on the way forgets all the others."""
    large = 2 / torch.finfo(dtype).eps
    weight = torch.tensor([large] + [0.9] * 63, dtype=dtype).expand(2, 3, -1).contiguous()
    states = torch.ones(4, 64, dtype=dtype)
    found = linear_of_expert(states, weight, torch.tensor([0, 0, 1, 1]))
    assert torch.equal(found, weight.double().sum(dim=-1)[0, 0].to(dtype).expand(4, 3))


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


@pytest.mark.parametrize("reason", ["many tokens", "gradients", "expert parallelism", "no tokens", "no compilation"])
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
    switch = torch._dynamo.config.patch(disable=reason == "no compilation")
    with switch, torch.set_grad_enabled(reason == "gradients"):
        found = fused_gather_experts_forward(experts, *inputs)
    assert len(calls) == 1
    torch.testing.assert_close(found, Glm4MoeExperts.forward.__wrapped__(experts, *inputs))


@torch.no_grad()
def test_leaves_experts_of_another_form_alone(refuse_grouped_mm):
    config = GptOssConfig(hidden_size=HIDDEN_SIZE, intermediate_size=12, num_local_experts=NUM_EXPERTS)
    experts = GptOssExperts(config)  # with biases, and transposed
    with pytest.raises(AssertionError, match="fell back to grouped_mm"):
        fused_gather_experts_forward(experts, *tokens(4, torch.float32))


def test_float64_with_gradients(experts):
    inputs = tokens(4, torch.float64)
    found = fused_gather_experts_forward(experts.double(), inputs[0].requires_grad_(), *inputs[1:])
    found.sum().backward()
    assert inputs[0].grad.abs().sum() > 0
    torch.testing.assert_close(found, Glm4MoeExperts.forward.__wrapped__(experts, *inputs))


@torch.no_grad()
def test_says_that_a_compiler_is_missing(experts, monkeypatch):
    compiled = experts_fused_gather._compiled_linear_of_expert.__wrapped__  # not yet called
    monkeypatch.setattr(experts_fused_gather, "_compiled_linear_of_expert", compiled)
    switch = torch._inductor.config.patch({"cpp.cxx": ("/nowhere/g++",)})
    with switch, pytest.raises(RuntimeError, match="`experts_implementation='fused_gather'` needs a C\\+\\+ compiler"):
        fused_gather_experts_forward(experts.float(), *tokens(4, torch.float32))
