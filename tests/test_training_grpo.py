"""GRPO with block-diffusion rollouts: the estimate, the ratio, and that rewards rise."""

import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from tests.training_common import BLOCK, RUN
from tests.training_common import tiny_model as small_model
from transformers_llada_uni.training import LLaDAUniGRPOConfig, LLaDAUniGRPOTrainer


END = 440
MASK = 441


def tiny_model(seed=0):
    return small_model(seed, vocab_size=768, mask_token_id=MASK, eos_token_id=END, pad_token_id=END)


@pytest.fixture(scope="module")
def tokenizer(official_tiny):
    return AutoTokenizer.from_pretrained(official_tiny)


def share_of_low_tokens(completion_ids, **kwargs):
    """At random about a half; 1 for the best policies."""
    return [sum(token < 384 for token in ids) / len(ids) for ids in completion_ids]


def make_trainer(
    tokenizer, output_dir, model=None, reward=share_of_low_tokens, dataset=None, peft_config=None, **settings
):
    settings = {
        **RUN,
        "per_device_train_batch_size": 8,
        "num_generations": 8,
        "max_completion_length": 6,
        "num_steps_per_block": 2,
        "max_steps": 1,
        **settings,
    }
    return LLaDAUniGRPOTrainer(
        model=tiny_model() if model is None else model,
        reward_funcs=reward,
        args=LLaDAUniGRPOConfig(str(output_dir), **settings),
        train_dataset=Dataset.from_dict({"prompt": ["one two", "three"] * 8}) if dataset is None else dataset,
        processing_class=tokenizer,
        peft_config=peft_config,
    )


# Left-padded prompts of 5 and 3 tokens, answers of 6 and 4.
INPUT_IDS = torch.tensor([[*range(11, 16), *range(21, 27)], [END, END, *range(31, 34), *range(41, 45), END, END]])
ATTENTION_MASK = torch.tensor([[1] * 11, [0, 0] + [1] * 7 + [0, 0]])


def test_full_mask_estimate_equals_single_forwards(tokenizer, tmp_path):
    trainer = make_trainer(tokenizer, tmp_path)
    with torch.no_grad():
        logps, entropies, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, INPUT_IDS, ATTENTION_MASK, 6, compute_entropy=True
        )
        model = tiny_model()
        for row in range(2):
            ids = INPUT_IDS[row][ATTENTION_MASK[row].bool()].tolist()
            first = [5, 3][row]
            for place in range(first, len(ids)):
                begin = place // BLOCK * BLOCK
                seen = [*ids[:begin], *(token if begin + i < first else MASK for i, token in enumerate(ids[begin:]))]
                seen = (seen + [MASK] * BLOCK)[: begin + BLOCK]
                log_probs = model(input_ids=torch.tensor([seen])).logits[0, place].log_softmax(-1)
                torch.testing.assert_close(logps[row, place - first], log_probs[ids[place]], atol=1e-5, rtol=1e-5)
                entropy = -(log_probs.exp() * log_probs).sum()
                torch.testing.assert_close(entropies[row, place - first], entropy, atol=1e-5, rtol=1e-5)
    assert logps[1, 4:].abs().sum() == 0


@pytest.mark.parametrize("estimate", ["full_mask", "complementary"])
def test_an_estimate_depends_on_the_row_alone(tokenizer, tmp_path, estimate):
    trainer = make_trainer(tokenizer, tmp_path, log_probability_estimate=estimate, num_noise_samples=2)
    with torch.no_grad():
        arguments = (trainer.model, INPUT_IDS, ATTENTION_MASK, 6)
        both, _, _ = trainer._get_per_token_logps_and_entropies(*arguments)
        again, _, _ = trainer._get_per_token_logps_and_entropies(*arguments, batch_size=1)
        alone, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, INPUT_IDS[1:, 2:9], ATTENTION_MASK[1:, 2:9], 4
        )
    torch.testing.assert_close(again, both, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(alone[0], both[1, :4], atol=1e-5, rtol=1e-5)


def test_complementary_estimate_covers_every_token(tokenizer, tmp_path):
    trainer = make_trainer(tokenizer, tmp_path, log_probability_estimate="complementary", num_noise_samples=3)
    chunk = trainer._lay_out(INPUT_IDS, ATTENTION_MASK, 6)
    is_answer = chunk["labels"] != -100
    assert chunk["masked"].shape[1] == 6
    assert torch.equal(chunk["masked"].sum(dim=1), 3 * is_answer)
    torch.testing.assert_close(chunk["weights"].sum(dim=1), is_answer.float())


@pytest.mark.parametrize("estimate", ["full_mask", "complementary"])
def test_the_ratio_is_one_before_the_first_update(tokenizer, tmp_path, estimate):
    """With several iterations old log-probabilities are made when the rollout is; they must equal the new ones."""
    trainer = make_trainer(
        tokenizer,
        tmp_path,
        num_iterations=2,
        beta=0.1,
        log_probability_estimate=estimate,
        learning_rate=1e-2,
        max_steps=2,
    )
    seen = []
    original = trainer._compute_loss

    def spy(model, inputs):
        keep = inputs["completion_ids"].shape[1]
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        logps, _, _ = trainer._get_per_token_logps_and_entropies(model, ids, mask, keep)
        old, reference = inputs["old_per_token_logps"], inputs["ref_per_token_logps"]
        seen.append(((logps - old).abs().max().item(), (logps - reference).abs().max().item()))
        return original(model, inputs)

    trainer._compute_loss = spy
    trainer.train()
    assert seen[0] == (0.0, 0.0)
    assert seen[1][0] > 1e-4  # after an update they differ


@pytest.mark.parametrize("with_adapter", [False, True])
def test_the_reward_rises_to_its_optimum(tokenizer, tmp_path, with_adapter):
    from transformers_llada_uni.training.lora import lora_config

    model = tiny_model()
    model.lm_head.weight.data *= 20  # a new head is too flat for any hidden state to decide a token
    trainer = make_trainer(
        tokenizer,
        tmp_path,
        model=model,
        max_steps=40,
        learning_rate=2e-2 if with_adapter else 1e-2,
        per_device_train_batch_size=16,
        temperature=1.0,
        peft_config=lora_config(r=8) if with_adapter else None,
    )
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert rewards[0] < 0.8 and sum(rewards[-3:]) / 3 > 0.97


def test_rollouts_repeat_with_the_seed(tokenizer, tmp_path):
    rollouts = []
    for seed in (1, 1, 2):
        seen = []

        def reward(completion_ids, seen=seen, **kwargs):
            seen.extend(completion_ids)
            return [0.0] * len(completion_ids)

        make_trainer(tokenizer, tmp_path, reward=reward, seed=seed, data_seed=0).train()
        rollouts.append(seen)
    assert rollouts[0] == rollouts[1] != rollouts[2]


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_pictures_are_rolled_out_and_rewarded(converted_dir, tmp_path, guidance_scale):
    processor = AutoProcessor.from_pretrained(converted_dir / "processor")
    model = AutoModelForImageTextToText.from_pretrained(converted_dir / "model")
    offset = model.config.text_config.image_token_offset
    seen = []

    def decode_images(codes):
        return [Image.new("L", grid.shape[::-1], int(grid.float().mean())) for grid in codes]

    def reward(completion_ids, image_codes, generated_images, grid, **kwargs):
        for ids, codes, picture, size in zip(completion_ids, image_codes, generated_images, grid, strict=True):
            assert codes.shape == tuple(size) and picture.size == tuple(size)[::-1]
            assert ids == (codes.flatten() + offset).tolist() and codes.min() >= 0
            seen.append(codes)
        return [float(codes.float().mean()) for codes in image_codes]

    trainer = LLaDAUniGRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=LLaDAUniGRPOConfig(
            str(tmp_path),
            **{**RUN, "per_device_train_batch_size": 4, "num_generations": 2, "max_steps": 2, "learning_rate": 1e-3},
            block_length=8,
            num_steps_per_block=2,
            guidance_scale=guidance_scale,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["a cat", "a dog"] * 4, "grid": [[2, 3], [3, 2]] * 4}),
        processing_class=processor,
        decode_images=decode_images,
    )
    before = model.model.language_model.layers[0].attention.dense.weight.detach().clone()
    trainer.train()
    assert len(seen) == 8
    assert not torch.equal(before, model.model.language_model.layers[0].attention.dense.weight)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"use_vllm": True}, "use_vllm"),
        ({"min_p": 0.1}, "min_p"),
        ({"log_probability_estimate": "exact"}, "log_probability_estimate"),
        ({"num_noise_samples": 0}, "num_noise_samples"),
        ({"threshold": 1.5}, "threshold"),
        ({"num_steps_per_block": 0}, "num_steps_per_block"),
        ({"guidance_scale": -1.0}, "guidance_scale"),
        ({"sync_ref_model": True}, "sync_ref_model"),
    ],
)
def test_bad_settings_are_refused(settings, name, tmp_path):
    with pytest.raises(ValueError, match=f"`{name}`"):
        LLaDAUniGRPOConfig(str(tmp_path), **settings)


def test_bad_arguments_are_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="`prompt`"):
        make_trainer(tokenizer, tmp_path, dataset=Dataset.from_dict({"text": ["a"]}))
    with pytest.raises(TypeError, match="`processing_class`"):
        make_trainer(tokenizer, tmp_path, dataset=Dataset.from_dict({"prompt": ["a"], "grid": [[2, 2]]}))
