"""What holds for whole calls: logits that are no numbers are spoken of, threads do not meet, nothing is compiled."""

import json
import threading
from contextlib import nullcontext

import pytest
import torch

from tests.transformers_llada_uni.generation.property_cases import tiny_backbone
from tests.transformers_llada_uni.generation.recorded_steps import recorded_on_cpu
from transformers_llada_uni import LLaDAUniForConditionalGeneration
from transformers_llada_uni.generation.sampling import _deterministic_cumulative_sum


IDS = torch.arange(10, 31)[None]
TEXT = {"input_ids": IDS, "max_new_tokens": 20, "block_length": 8, "eos_token_id": []}
CODES = {"input_ids": IDS, "negative_input_ids": IDS[:, :9], "grid": (4, 6), "block_length": 8}


@pytest.mark.parametrize("steps", [nullcontext, recorded_on_cpu], ids=["eager", "recorded"])
class TestLogitsThatAreNoNumbers:
    @pytest.fixture
    def model(self):
        model = tiny_backbone().float()
        model.set_experts_implementation("batched_mm")
        return model

    @pytest.mark.parametrize("settings", [{}, {"do_sample": True}, {"threshold": 1.0}, {"editing_threshold": 0.5}])
    def test_are_said_once(self, model, caplog, steps, settings):
        with steps():
            model.generate(**TEXT, **settings)
            assert not caplog.records
            model.model.layers[1].mlp.gate.weight.data[0] = torch.nan
            model.model.norm.weight.data[3] = torch.nan
            model.generate(**TEXT, **settings)
        [record] = caplog.records
        assert "NaN" in record.getMessage()

    def test_too_much_guidance(self, model, caplog, steps):
        with steps():
            model.generate_image_codes(**CODES, guidance_scale=50.0)
            assert not caplog.records
            model.generate_image_codes(**CODES, guidance_scale=1e30)
        [record] = caplog.records
        assert "`guidance_scale`" in record.getMessage()


def test_compiled_generation_runs_as_it_is():
    model = tiny_backbone()
    torch._dynamo.reset()
    generate, codes = (
        torch.compile(method, backend="eager") for method in (model.generate, model.generate_image_codes)
    )
    assert torch.equal(generate(**TEXT), model.generate(**TEXT))
    assert torch.equal(codes(**CODES), model.generate_image_codes(**CODES))


def test_threads_that_share_a_model(official_tiny, converted_dir):
    """Of all kinds of generation, eager and sampled, each call gives what it gives alone."""
    model = LLaDAUniForConditionalGeneration.from_pretrained(converted_dir / "model")
    case = json.loads((official_tiny / "expected" / "generation.json").read_text())["text_to_image"][0]
    ids, negative = torch.tensor([case["cond_ids"]]), torch.tensor([case["uncond_ids"]])
    settings = {"block_length": 8, "num_steps_per_block": 3}

    def call(number: int) -> torch.Tensor:
        kind, seed = number % 4, number // 4
        sampling = {}
        if seed % 2:
            sampling = {"do_sample": True, "generator": torch.Generator().manual_seed(seed)}
        prompt = ids[:, seed:]
        if kind == 0:
            return model.generate(prompt, max_new_tokens=24, **settings, **sampling)
        if kind == 1:
            return model.generate(prompt, max_new_tokens=24, cache_implementation="sprint", **settings, **sampling)
        guided = {"negative_input_ids": negative, **settings, **sampling}
        if kind == 2:
            return model.generate_image_codes(prompt, (4, 4), guidance_scale=2.0 + seed, **guided)
        return model.generate_interleaved(
            prompt, grid=(2, 3), uncondition_ids=negative[:, :2], max_new_tokens=16, max_images=2, **guided
        )

    wanted = [call(number) for number in range(32)]
    found: list[torch.Tensor | None] = [None] * 32

    def work(first: int) -> None:
        for number in range(8 * first, 8 * first + 8):
            found[number] = call(number)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, (tokens, others) in enumerate(zip(wanted, found, strict=True)):
        assert others is not None and torch.equal(tokens, others), number


def test_the_cumulative_sum_that_is_deterministic_everywhere():
    values = torch.rand(3, 1000, generator=torch.Generator().manual_seed(0))
    found = _deterministic_cumulative_sum(values)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, values.double().cumsum(dim=-1), rtol=1e-12, atol=0)
