"""Self-speculation gives what blocks of one token give, in fewer passes."""

import pytest
import torch

from tests.transformers_llada_uni.generation.property_cases import tiny_backbone
from transformers_llada_uni import BlockDiffusionGenerationConfig, LLaDA2MoeForBlockDiffusion
from transformers_llada_uni.generation.continuous_batch import ContinuousBatch


ENDS = {"eos_token_id": [1, 2, 3]}


@pytest.fixture(scope="module")
def model():
    return tiny_backbone()


def ids_of(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(4, 60, (1, length), generator=torch.Generator().manual_seed(seed))


class TestEqualsBlocksOfOneToken:
    @pytest.mark.parametrize(
        "settings",
        [{"block_length": 8}, {"block_length": 5, "num_steps_per_block": 1, "credit_alpha": 2.0}, {"block_length": 1}],
        ids=["threshold", "one step", "of drafts of one token"],
    )
    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    def test_any_prompt(self, model, settings, implementation):
        model.set_attn_implementation(implementation)
        for length in (1, 8, 13):
            arguments = {"input_ids": ids_of(length), "max_new_tokens": 19, "return_dict_in_generate": True} | ENDS
            wanted = model.generate(**arguments, block_length=1)
            found = model.generate(**arguments, threshold=0.1, self_speculation=True, **settings)
            assert torch.equal(found.sequences, wanted.sequences)
            # Each pass that verifies finds a token, besides those that draft.
            steps = min(settings.get("num_steps_per_block", 32), settings["block_length"])
            blocks = 1 + -(-19 // settings["block_length"])
            assert found.num_forward_passes <= wanted.num_forward_passes + steps * blocks
        model.set_attn_implementation("sdpa")

    def test_rows_that_are_padded_and_end_apart(self, model):
        prompts = [ids_of(length, seed=length)[0] for length in (3, 17, 8, 9)]
        width = max(map(len, prompts))
        ids = torch.stack([torch.nn.functional.pad(prompt, (width - len(prompt), 0)) for prompt in prompts])
        mask = torch.stack([(torch.arange(width) >= width - len(prompt)).long() for prompt in prompts])
        arguments = {"max_new_tokens": 24} | ENDS
        found = model.generate(ids, mask, block_length=8, threshold=0.1, self_speculation=True, **arguments)
        assert torch.equal(found, model.generate(ids, mask, block_length=1, **arguments))
        lengths = {int((row[width:] != model.config.pad_token_id).sum()) for row in found}
        assert len(lengths) > 1  # they do end apart

    def test_gaps_in_a_prompt(self, model):
        ids = ids_of(21)
        ids[0, [2, 3, 7, 8, 20]] = model.config.mask_token_id
        arguments = {"input_ids": ids, "max_new_tokens": 11, "eos_token_id": []}
        found = model.generate(**arguments, block_length=8, self_speculation=True)
        assert torch.equal(found, model.generate(**arguments, block_length=1))

    def test_a_first_block_of_masks(self, model):
        ids = torch.full((1, 8), model.config.mask_token_id)
        arguments = {"input_ids": ids, "max_new_tokens": 11, "eos_token_id": []}
        found = model.generate(**arguments, block_length=8, self_speculation=True)
        assert torch.equal(found, model.generate(**arguments, block_length=1))

    def test_the_released_code_s_checkpoint(self, official_tiny):
        released = LLaDA2MoeForBlockDiffusion.from_pretrained(official_tiny).double().eval()
        released.set_experts_implementation("eager")
        arguments = {"input_ids": torch.arange(20, 51)[None], "max_new_tokens": 40, "eos_token_id": []}
        arguments["mask_token_id"] = 441
        found = released.generate(**arguments, num_steps_per_block=1, self_speculation=True)
        assert torch.equal(found, released.generate(**arguments, block_length=1))


def test_drafts_that_are_right_save_passes(model):
    """A model whose prediction does not depend on what else is written drafts what it verifies."""
    model = tiny_backbone()
    with torch.no_grad():
        for layer in model.get_decoder().layers:
            layer.attention.dense.weight.zero_()
    arguments = {"input_ids": ids_of(9), "max_new_tokens": 31, "eos_token_id": [], "return_dict_in_generate": True}
    wanted = model.generate(**arguments, block_length=1)
    settings = {"block_length": 8, "num_steps_per_block": 1, "self_speculation": True}
    found = model.generate(**arguments, **settings)
    assert torch.equal(found.sequences, wanted.sequences)
    assert (wanted.num_forward_passes, found.num_forward_passes) == (31, 8)  # of 4 blocks each a draft and a check


def test_what_a_block_has_found_the_next_does_not_draft():
    model = tiny_backbone()
    with torch.no_grad():
        for layer in model.get_decoder().layers:
            layer.attention.dense.weight.zero_()
    settings = {"max_new_tokens": 16, "eos_token_id": [], "block_length": 8, "threshold": 1.0}
    found = model.generate(ids_of(8), self_speculation=True, return_dict_in_generate=True, **settings)
    assert found.num_forward_passes == 8 + 1 + 7 + 1  # the first check finds a token of the second block


class TestWhatCannotBeHad:
    @pytest.mark.parametrize(
        "settings",
        [
            {"do_sample": True},
            {"editing_threshold": 0.5},
            {"remasking_threshold": 0.5},
            {"use_cache": False},
            {"cache_implementation": "sprint"},
            {"use_cuda_graphs": True},
        ],
        ids=str,
    )
    def test_other_settings_are_named(self, model, settings):
        with pytest.raises(ValueError, match=f"`self_speculation=True` cannot be had with `{next(iter(settings))}"):
            model.generate(ids_of(4), self_speculation=True, **settings)

    def test_gradient_checkpointing_drops_caches(self):
        model = tiny_backbone().train()
        model.activation_checkpointing_enable()
        with pytest.raises(ValueError, match="`self_speculation=True` needs a cache"):
            model.generate(ids_of(4), self_speculation=True)

    def test_rows_that_come_and_go(self, model):
        with pytest.raises(ValueError, match="`self_speculation=True` cannot be had"):
            ContinuousBatch(model, self_speculation=True)

    def test_image_codes(self, model):
        """Of a call; a file beside the model may say it, for its texts."""
        with pytest.raises(TypeError, match="`generate_image_codes` takes no `self_speculation`"):
            model.generate_image_codes(ids_of(9), (3, 4), self_speculation=True)

    def test_attention_without_masks_for_each_query(self, model, monkeypatch):
        monkeypatch.setattr(model.config, "_attn_implementation_internal", "flash_attention_2")
        with pytest.raises(ValueError, match="`self_speculation` needs masks that `attn_implementation='flash"):
            model.generate(ids_of(4), self_speculation=True)

    @pytest.mark.parametrize("settings", [{}, {"do_sample": True}, {"remasking_threshold": 0.5}], ids=str)
    def test_image_codes_are_generated_as_ever(self, model, settings):
        """Though a file beside the model say it, and they be sampled."""
        config = BlockDiffusionGenerationConfig(block_length=8, self_speculation=True)

        def draw(**more) -> torch.Tensor:
            generator = torch.Generator().manual_seed(0)
            return model.generate_image_codes(ids_of(9), (3, 4), generator=generator, **settings, **more)

        assert torch.equal(draw(generation_config=config), draw(block_length=8))
