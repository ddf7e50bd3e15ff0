"""Router and experts under autocast, which casts what `nn.Linear` computes and knows nothing of grouped products."""

import pytest
import torch
from torch.nn.utils import parametrize
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
    assert 1e-3 < (found - exact).norm() / exact.norm() < 0.02
    (gradient,) = torch.autograd.grad(found.square().sum(), block.experts.gate_up_proj)
    (exact_gradient,) = torch.autograd.grad(exact.square().sum(), block.experts.gate_up_proj)
    assert gradient.dtype == torch.float32
    assert 0 < (gradient - exact_gradient).norm() < 0.05 * exact_gradient.norm()


def test_experts_that_something_is_added_to_are_called_as_they_are(block):
    """As peft does with `target_parameters`: weights cast beforehand would be without it."""
    exact = block(STATES)

    class Doubled(torch.nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 2 * weight

    parametrize.register_parametrization(block.experts, "down_proj", Doubled())
    doubled = block(STATES)
    found = under_autocast(block, STATES)
    assert (found - doubled).norm() < 0.02 * doubled.norm()
    assert (found - exact).norm() > 0.1 * exact.norm()


def test_the_router_stays_in_float32(block):
    """Rounded scores tie, and other experts would be chosen in training than are in inference."""
    for found, wanted in zip(
        under_autocast(block.gate, STATES.flatten(0, 1)), block.gate(STATES.flatten(0, 1)), strict=True
    ):
        assert found.dtype == wanted.dtype and torch.equal(found, wanted)
