"""Best of n: its scores are the model's, whatever the batch, and choose what was said."""

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from transformers_llada_uni import BlockDiffusionGenerationConfig
from transformers_llada_uni.generation import best_of
from transformers_llada_uni.generation.best_of import (
    answer_log_probs,
    candidate_generators,
    check_can_judge,
    prompt_recall,
    rewards_of,
)


@pytest.fixture(scope="module")
def model(converted_dir):
    return AutoModelForImageTextToText.from_pretrained(converted_dir / "model").eval()


@pytest.fixture(scope="module")
def processor(converted_dir):
    return AutoProcessor.from_pretrained(converted_dir / "processor")


def rows(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 200, (length,), generator=generator) for length in lengths]


def by_hand(model, prompt: torch.Tensor, answer: torch.Tensor) -> float:
    """Block by block, with the logits of a plain forward pass."""
    length, config = model.generation_config.block_length, model.config.get_text_config()
    ids, total = torch.cat([prompt, answer]), 0.0
    for start in range(len(prompt) // length * length, len(ids), length):
        hidden = range(max(start, len(prompt)), min(start + length, len(ids)))
        shown = torch.full((start + length,), config.mask_token_id)
        shown[: hidden[0]] = ids[: hidden[0]]
        with torch.no_grad():
            log_probs = model(input_ids=shown[None]).logits[0].float().log_softmax(-1)
        total += sum(float(log_probs[place, ids[place]]) for place in hidden)
    return total / len(answer)


def test_answers_are_scored_block_by_block_whatever_the_batch(model, monkeypatch):
    length = model.generation_config.block_length
    prompts, answers = rows(5, length, 2 * length + 3), rows(3, 2 * length, length)
    expected = [by_hand(model, *pair) for pair in zip(prompts, answers, strict=True)]
    assert answer_log_probs(model, prompts, answers) == pytest.approx(expected, abs=1e-4)
    monkeypatch.setattr(best_of, "MAX_TOKENS", 1)  # a row at a time
    assert answer_log_probs(model, prompts, answers) == pytest.approx(expected, abs=1e-4)


def test_the_judge_has_the_blocks_that_the_model_writes(model, monkeypatch):
    """Whatever its configuration says of training, and whoever's class its own settings are of."""
    length = model.generation_config.block_length // 2
    prompts, answers = rows(5, length, 2 * length + 3), rows(3, 2 * length, length)
    monkeypatch.setattr(model, "generation_config", BlockDiffusionGenerationConfig(block_length=length))
    with monkeypatch.context() as patch:
        patch.setattr(model.config.get_text_config(), "block_length", length)
        expected = [by_hand(model, *pair) for pair in zip(prompts, answers, strict=True)]
    assert answer_log_probs(model, prompts, answers) == pytest.approx(expected, abs=1e-4)
    monkeypatch.setattr(model, "generation_config", GenerationConfig())
    assert len(answer_log_probs(model, prompts, answers)) == 3


def test_flash_attention_cannot_judge(model, monkeypatch):
    check_can_judge(model)
    monkeypatch.setattr(model.get_decoder().config, "_attn_implementation", "flash_attention_2")
    with pytest.raises(ValueError, match="`num_candidates` needs a `reward`, or another `attn_implementation`"):
        check_can_judge(model)


def test_an_image_is_asked_about_by_its_codes(model, processor):
    codes, question = torch.arange(4).view(2, 2), "What is this?"
    asked = processor(text=question, image_codes=codes, task="understanding")["input_ids"]
    length, prompt = model.generation_config.block_length, "a cat a dog"
    end = -(-(asked.shape[1] + 4) // length) * length
    masks = torch.full((1, end - asked.shape[1]), model.config.get_text_config().mask_token_id)
    with torch.no_grad():
        probabilities = model(input_ids=torch.cat([asked, masks], 1)).logits[0, asked.shape[1] :].float().softmax(-1)
    words = set(processor.tokenizer(prompt, add_special_tokens=False)["input_ids"])
    expected = sum(float(probabilities[:, word].max()) for word in words) / len(words)
    found = prompt_recall(model, processor, [prompt, prompt], [codes, codes + 9])
    assert found[0] == pytest.approx(expected, rel=1e-3) and found[1] != pytest.approx(expected, rel=1e-3)


def test_each_candidate_has_a_generator_of_its_own():
    def drawn(seeds, count):
        generators = candidate_generators([torch.Generator().manual_seed(seed) for seed in seeds], count)
        return [float(torch.rand((), generator=generator)) for generator in generators]

    both = drawn([3, 4], 2)
    assert len(set(both)) == 4 and both[2:] == drawn([4], 2)
    one = [torch.Generator()]
    assert candidate_generators(one, 1) is one  # draws are as they were


def test_the_first_of_the_best_is_kept():
    assert best_of.best_of([1.0, 3.0, 3.0, 0.0, -1.0, -2.0], 3) == [1, 3]


@pytest.mark.parametrize("scores", [[1.0], [1.0, float("nan")], [1.0, float("inf")], 1.0, None, [None, 1.0], "xy"])
def test_a_reward_gives_a_number_for_each(scores):
    with pytest.raises(ValueError, match="`reward` must give a finite number for each of 2"):
        rewards_of(lambda **columns: scores, 2, prompts=["a", "a"])
