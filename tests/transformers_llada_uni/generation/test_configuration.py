"""The settings of generation: what they default to, what is warned of, and how calls and files set them."""

import json

import pytest
import torch

from tests.transformers_llada_uni.generation.property_cases import tiny_backbone
from transformers_llada_uni import BlockDiffusionGenerationConfig, LLaDA2MoeForBlockDiffusion
from transformers_llada_uni.generation import configuration


IDS = torch.arange(10, 31)[None]
CODES = {"input_ids": IDS, "grid": (3, 4), "negative_input_ids": IDS[:, :9], "block_length": 8}
CODES |= {"negative_image_input_ids": IDS[:, 5:]}


@pytest.fixture(scope="module")
def model():
    return tiny_backbone()


@pytest.fixture
def warnings(caplog):
    """What is warned of while the test runs, though it was warned of before."""
    configuration.logger.warning_once.cache_clear()
    return caplog


class TestGuidance:
    """Of a call, of a config in a call, of the file beside a model: all the same."""

    SCALES = {"guidance_scale": 3.5, "image_guidance_scale": 0.5, "guidance_rescale": 0.2}

    def test_all_ways_to_set_it(self, model, tmp_path):
        by_call = model.generate_image_codes(**CODES, **self.SCALES)
        config = BlockDiffusionGenerationConfig(block_length=8, **self.SCALES)
        assert torch.equal(model.generate_image_codes(**CODES, generation_config=config), by_call)
        model.save_pretrained(tmp_path)
        config.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "generation_config.json").read_text()).items() >= self.SCALES.items()
        loaded = LLaDA2MoeForBlockDiffusion.from_pretrained(tmp_path, dtype=torch.float64)
        loaded.set_experts_implementation("eager")
        assert torch.equal(loaded.generate_image_codes(**CODES), by_call)
        for name, value in {"guidance_scale": 1.5, "image_guidance_scale": 0.0, "guidance_rescale": 1.0}.items():
            assert not torch.equal(loaded.generate_image_codes(**CODES, **{name: value}), by_call), name

    def test_the_default_goes_by_the_negative_prompt(self, model):
        unguided = {name: value for name, value in CODES.items() if "negative" not in name}
        guided = model.generate_image_codes(**CODES)
        assert torch.equal(guided, model.generate_image_codes(**CODES, guidance_scale=2.0, guidance_rescale=0.7))
        assert torch.equal(
            model.generate_image_codes(**unguided), model.generate_image_codes(**CODES, guidance_scale=1)
        )
        assert not torch.equal(guided, model.generate_image_codes(**unguided))

    @pytest.mark.parametrize("name", SCALES)
    def test_text_has_none(self, model, name):
        with pytest.raises(TypeError, match=f"`generate` takes no `{name}`"):
            model.generate(IDS, **{name: 1.0})
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            BlockDiffusionGenerationConfig(**{name: -1.0})


class TestSettingsOfSampling:
    @pytest.mark.parametrize("settings", [{"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.9}])
    def test_without_sampling_they_are_warned_of_once(self, model, warnings, settings):
        [name] = settings
        for _ in range(2):
            model.generate(IDS, max_new_tokens=3, **settings)
        [record] = warnings.records
        assert f"`{name}`" in record.getMessage() and "`do_sample=True`" in record.getMessage()

    @pytest.mark.parametrize(
        "settings",
        [
            {"do_sample": True, "temperature": 0.7, "top_k": 5},
            {"do_sample": False, "temperature": None, "top_k": None, "top_p": None},  # what unsets them everywhere
            {"temperature": 1.0, "top_p": 1.0},
        ],
    )
    def test_what_is_meant_is_not_warned_of(self, model, warnings, settings):
        model.generate(IDS, max_new_tokens=3, **settings)
        assert not warnings.records

    def test_a_call_may_switch_the_sampling_of_a_file_off(self, model, warnings):
        config = BlockDiffusionGenerationConfig(do_sample=True, temperature=0.7, max_new_tokens=3)
        model.generate(IDS, generation_config=config, do_sample=False)
        assert not warnings.records

    def test_no_temperature_is_one(self, model):
        def sample(temperature: float | None) -> torch.Tensor:
            return model.generate(
                IDS,
                max_new_tokens=12,
                do_sample=True,
                temperature=temperature,
                generator=torch.Generator().manual_seed(0),
            )

        assert torch.equal(sample(None), sample(1.0))
        assert not torch.equal(sample(None), sample(3.0))


def test_the_default_cache_has_the_name_of_transformers(model):
    assert BlockDiffusionGenerationConfig().cache_implementation == "dynamic"
    wanted = model.generate(IDS, max_new_tokens=20, block_length=8)
    for name in ("dynamic", "exact"):
        assert torch.equal(model.generate(IDS, max_new_tokens=20, block_length=8, cache_implementation=name), wanted)


class TestAnswersToOnePrompt:
    SETTINGS = {"do_sample": True, "temperature": 2.0, "block_length": 8}

    @staticmethod
    def generators(*seeds: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    def test_text(self, model):
        ids, mask = torch.stack([IDS[0], IDS[0].flip(0)]), torch.ones(2, 21, dtype=torch.long)
        mask[1, :4] = 0
        arguments = self.SETTINGS | {"max_new_tokens": 12, "eos_token_id": [1]}
        found = model.generate(
            ids, attention_mask=mask, num_return_sequences=2, generator=self.generators(1, 2, 3, 4), **arguments
        )
        wanted = model.generate(
            ids.repeat_interleave(2, dim=0),
            attention_mask=mask.repeat_interleave(2, dim=0),
            generator=self.generators(1, 2, 3, 4),
            **arguments,
        )
        assert torch.equal(found, wanted)
        assert not torch.equal(found[0], found[1])

    def test_image_codes(self, model):
        known = {"image_codes": torch.arange(12)[None], "image_codes_mask": torch.arange(12)[None] > 5}
        found = model.generate_image_codes(
            **CODES, **known, num_return_sequences=2, generator=self.generators(1, 2), do_sample=True, temperature=2.0
        )
        for seed, codes in enumerate(found, start=1):
            alone = model.generate_image_codes(
                **CODES, **known, generator=self.generators(seed), do_sample=True, temperature=2.0
            )
            assert torch.equal(alone[0], codes)
        assert not torch.equal(found[0], found[1])

    def test_what_is_refused(self, model):
        with pytest.raises(ValueError, match="`num_return_sequences` is 2, but without `do_sample=True`"):
            model.generate(IDS, num_return_sequences=2)
        with pytest.raises(ValueError, match="`generator` has 1 generators for 2 rows"):
            model.generate(IDS, num_return_sequences=2, do_sample=True, generator=self.generators(1))


def test_without_a_prompt_generation_begins_with_the_bos_token(model):
    sequence = model.generate(bos_token_id=3, max_new_tokens=12, block_length=8)
    assert torch.equal(sequence, model.generate(torch.tensor([[3]]), max_new_tokens=12, block_length=8))
    with pytest.raises(ValueError, match="`input_ids` are not given, and no `bos_token_id`"):
        model.generate(max_new_tokens=12)


def test_text_generation_pipeline(official_tiny):
    from transformers import AutoTokenizer, pipeline

    generate = pipeline(
        "text-generation",
        model=LLaDA2MoeForBlockDiffusion.from_pretrained(official_tiny),
        tokenizer=AutoTokenizer.from_pretrained(official_tiny),
    )
    settings = {"max_new_tokens": 6, "mask_token_id": 441, "bos_token_id": 439}
    [[answer]] = [generate("", **settings)]
    assert set(answer) == {"generated_text"}
    answers = generate("a dog", num_return_sequences=3, do_sample=True, **settings)
    assert len(answers) == 3 and all(answer["generated_text"].startswith("a dog") for answer in answers)
