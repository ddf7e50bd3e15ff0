"""A model that `device_map="auto"` has put on two cards: fake tensors know their devices and compute nothing."""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorDeviceMismatchError, FakeTensorMode

from transformers_llada_uni import BlockDiffusionGenerationConfig
from transformers_llada_uni.generation.credit import CreditDecoding
from transformers_llada_uni.generation.guided_head import GuidedHead
from transformers_llada_uni.generation.policy import CommitPolicy
from transformers_llada_uni.generation.state import BlockState
from transformers_llada_uni.generation.step import DenoisingStep
from transformers_llada_uni.training.objective.block_diffusion import _likeliest, _score


# Two that torch has in each of its builds.
FIRST, LAST = torch.device("cpu"), torch.device("lazy:0")
BLOCK, VOCABULARY, WIDTH = 4, 32, 8


@pytest.fixture(autouse=True)
def fake_devices():
    with FakeTensorMode(), torch.no_grad():  # gradients ask for a real device
        yield


def backbone(input_ids: torch.Tensor, position_ids: torch.Tensor, **kwargs) -> SimpleNamespace:
    assert input_ids.device == position_ids.device == FIRST
    return SimpleNamespace(last_hidden_state=torch.empty(*input_ids.shape, WIDTH, device=LAST))


class Head(torch.nn.Module):
    """What accelerate makes of a head on the last card: its input is brought there."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(VOCABULARY, WIDTH, device=LAST))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states.to(LAST) @ self.weight.T


def test_devices_are_told_apart():
    with pytest.raises(FakeTensorDeviceMismatchError):
        torch.empty(2, device=FIRST) + torch.empty(2, device=LAST)


@pytest.mark.parametrize("guidance_ramp", [False, True])
@pytest.mark.parametrize("has_columns", [False, True])
@pytest.mark.parametrize("settings", [{}, {"editing_threshold": 0.5}, {"remasking_threshold": 0.5}])
@pytest.mark.parametrize("alpha", [None, 0.7])
def test_a_step(guidance_ramp, has_columns, settings, alpha):
    config = BlockDiffusionGenerationConfig(
        block_length=BLOCK, num_steps_per_block=2, mask_token_id=VOCABULARY - 1, **settings
    )
    state = BlockState(3, 2, BLOCK, 9, FIRST, True, has_credits=alpha is not None, has_guidance_weights=guidance_ramp)
    state.uniforms = torch.empty(9, 2, BLOCK, device=FIRST)
    step = DenoisingStep(
        backbone,
        GuidedHead(Head(), None, [VOCABULARY - 1], (2.0, 1.5, 0.3), 3),
        CommitPolicy(config, FIRST, is_image=False),
        BLOCK,
        None,
        None,
        credit=None if alpha is None else CreditDecoding(alpha),
    )
    columns = torch.empty(2, 3, dtype=torch.long, device=FIRST) if has_columns else None
    step(state, torch.empty(3, 2, dtype=torch.long, device=FIRST), columns=columns)
    assert {value.device for value in vars(state).values() if isinstance(value, torch.Tensor)} == {FIRST}


def test_the_objective(monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: False)  # it does not know the second device
    model = SimpleNamespace(
        get_output_embeddings=Head,
        config=SimpleNamespace(get_text_config=lambda: SimpleNamespace(mask_token_id=VOCABULARY - 1)),
    )
    states, targets = torch.empty(5, WIDTH, device=FIRST), torch.empty(5, dtype=torch.long, device=FIRST)
    assert [values.device for values in _score(model, states, targets, keep_entropy=True)] == [FIRST] * 4
    assert [values.device for values in _score(model, states[:0], targets[:0], keep_entropy=True)] == [FIRST] * 4
    assert _likeliest(model, states).device == FIRST
