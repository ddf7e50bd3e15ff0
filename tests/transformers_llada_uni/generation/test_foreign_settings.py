"""Whatever `generate` of transformers takes is taken, or refused by name; nothing is ignored."""

import inspect

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation import GenerationMixin

from tests.transformers_llada_uni.generation.property_cases import tiny_backbone
from transformers_llada_uni import BlockDiffusionGenerationConfig
from transformers_llada_uni.generation.foreign_settings import REASONS


IDS = torch.arange(10, 31)[None]
SETTINGS = {"max_new_tokens": 11, "block_length": 8, "eos_token_id": None}


@pytest.fixture(scope="module")
def model():
    return tiny_backbone()


def test_every_name_of_transformers_is_known(model):
    of_config = {name for name in vars(GenerationConfig()) if not name.startswith("_")} - {"transformers_version"}
    of_call = set(inspect.signature(GenerationMixin.generate).parameters) - {"self", "kwargs"}
    ours = {*BlockDiffusionGenerationConfig.defaults(), *inspect.signature(model.generate).parameters}
    assert (of_config | of_call) - ours - set(REASONS) == set()
    assert not ours & set(REASONS)


def test_what_asks_for_something_is_refused_with_the_reason(model):
    for name, reason in REASONS.items():
        for method, arguments in (
            (model.generate, SETTINGS),
            (model.generate_image_codes, {"grid": (2, 2)}),
        ):
            with pytest.raises(TypeError) as caught:
                method(IDS, **{name: "something"}, **arguments)
            assert str(caught.value) == f"`{name}` is not supported by block diffusion: {reason}."
    with pytest.raises(TypeError, match="`token_type_ids`"):
        model.generate(IDS, token_type_ids=IDS, **SETTINGS)


def test_what_asks_for_nothing_is_taken(model):
    neutral = dict.fromkeys(REASONS) | {
        "num_beams": 1,
        "repetition_penalty": 1.0,
        "min_length": 0,
        "logits_processor": [],
        "output_scores": False,
        "synced_gpus": False,
        "token_type_ids": torch.zeros_like(IDS),
    }
    assert torch.equal(model.generate(inputs=IDS, **neutral, **SETTINGS), model.generate(IDS, **SETTINGS))


class TestConfigurationOfTransformers:
    def test_what_it_sets_goes_before_the_model_and_behind_the_call(self, model):
        wanted = model.generate(IDS, **SETTINGS, num_steps_per_block=2)
        config = GenerationConfig(max_new_tokens=11, block_length=5, num_beams=1, eos_token_id=None)
        arguments = {"block_length": 8, "eos_token_id": None, "num_steps_per_block": 2}
        assert torch.equal(model.generate(IDS, generation_config=config, **arguments), wanted)
        assert config.block_length == 5

    def test_it_may_be_the_model_s_own(self, model, monkeypatch):
        wanted = model.generate(IDS, max_new_tokens=11)
        monkeypatch.setattr(model, "generation_config", GenerationConfig(max_new_tokens=11))
        assert torch.equal(model.generate(IDS), wanted)
        assert torch.equal(
            model.generate(IDS, generation_config=BlockDiffusionGenerationConfig(max_new_tokens=5)), wanted[:, :-6]
        )

    def test_what_is_set_on_ours_is_looked_at_too(self, model):
        """As `transformers serve` does with a request's penalties."""
        config = BlockDiffusionGenerationConfig(**SETTINGS)
        config.repetition_penalty = 1.0
        assert torch.equal(model.generate(IDS, generation_config=config), model.generate(IDS, **SETTINGS))
        config.repetition_penalty = 1.5
        with pytest.raises(TypeError, match="`repetition_penalty`"):
            model.generate(IDS, generation_config=config)
