"""Router and experts under autocast, which casts what `nn.Linear` computes and knows nothing of grouped products."""

import threading

import pytest
import torch
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeExperts

from transformers_llada_uni import LLaDA2MoeConfig
from transformers_llada_uni.mixture_of_experts import LLaDA2MoeSparseMoeBlock


STATES = torch.randn(2, 20, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def block() -> LLaDA2MoeSparseMoeBlock:
    sizes = {"hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2}
    block = LLaDA2MoeSparseMoeBlock(LLaDA2MoeConfig(**sizes, n_group=2, topk_group=1))
    generator = torch.Generator().manual_seed(0)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return block


def under_autocast(module: torch.nn.Module, *inputs: torch.Tensor):
    with torch.autocast("cpu", torch.bfloat16):
        return module(*inputs)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
def test_experts_compute_in_the_type_of_autocast(block, implementation, monkeypatch):
    block.gate.config._experts_implementation = implementation
    block.shared_experts.down_proj.weight.data.zero_()
    exact, forward, dtypes = block(STATES), Glm4MoeExperts.forward, []

    def recorded(self, *args, **kwargs):
        dtypes.append((self.gate_up_proj.dtype, self.down_proj.dtype))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(Glm4MoeExperts, "forward", recorded)
    found = under_autocast(block, STATES)
    assert dtypes == [(torch.bfloat16, torch.bfloat16)]
    with torch.no_grad():
        assert torch.equal(under_autocast(block, STATES), found)
    assert 1e-3 < (found - exact).norm() / exact.norm() < 0.02
    (gradient,) = torch.autograd.grad(found.square().sum(), block.experts.gate_up_proj)
    (exact_gradient,) = torch.autograd.grad(exact.square().sum(), block.experts.gate_up_proj)
    assert gradient.dtype == torch.float32
    assert 0 < (gradient - exact_gradient).norm() < 0.05 * exact_gradient.norm()


def test_threads_share_experts_under_autocast(block):
    wanted, found = under_autocast(block, STATES), []

    def work() -> None:
        found.extend(under_autocast(block, STATES) for _ in range(20))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 60 and all(torch.equal(states, wanted) for states in found)
    assert all(type(weight) is torch.nn.Parameter for weight in block.parameters())
    assert {weight.dtype for weight in block.parameters()} == {torch.float32}


def test_hooks_of_experts_are_called_with_weights_as_they_are(block):
    """Such as fetch weights: what has been cast before them would be without what they do."""
    seen = []
    block.experts.register_forward_pre_hook(lambda module, inputs: seen.append(module.gate_up_proj.dtype))
    under_autocast(block, STATES)
    assert seen == [torch.float32]


@pytest.mark.parametrize("device, dtype", [("meta", torch.bfloat16), ("cpu", torch.float64)])
def test_what_autocast_leaves_alone_is_left_alone(block, device, dtype):
    block.gate.config._experts_implementation = "batched_mm"
    block = block.to(device, dtype)
    states = STATES.to(device, dtype)
    assert block(states).shape == under_autocast(block, states).shape == states.shape


@pytest.mark.parametrize("is_compiled", [False, True])
def test_gradients_reach_the_weights_of_experts(block, is_compiled):
    block.gate.config._experts_implementation = "grouped_mm"
    if is_compiled:
        torch._dynamo.reset()
        block.compile(backend="aot_eager", fullgraph=True)
    under_autocast(block, STATES).square().sum().backward()
    for weight in block.experts.parameters():
        assert weight.grad.dtype == torch.float32 and weight.grad.abs().sum() > 0


def test_the_router_stays_in_float32(block):
    """Rounded scores tie, and other experts would be chosen in training than are in inference."""
    for found, wanted in zip(
        under_autocast(block.gate, STATES.flatten(0, 1)), block.gate(STATES.flatten(0, 1)), strict=True
    ):
        assert found.dtype == wanted.dtype and torch.equal(found, wanted)


@pytest.mark.parametrize("cast", [lambda module: module.to(torch.bfloat16), lambda module: module.half()])
def test_the_bias_keeps_its_digits_where_all_is_cast(block, cast):
    block.gate.expert_bias.copy_(torch.linspace(-1, 1, 8) / 3)
    wanted = block.gate.expert_bias.clone()
    cast(block)
    assert block.gate.weight.dtype != torch.float32
    assert block.gate.expert_bias.dtype == torch.float32 and torch.equal(block.gate.expert_bias, wanted)
    assert "expert_bias" in dict(block.gate.named_buffers())
    assert block.to("meta").gate.expert_bias.is_meta
    assert block.double().gate.expert_bias.dtype == torch.float64
