"""GRPO with block-diffusion rollouts: the estimate, the ratio, and that rewards rise."""

import asyncio
from functools import partial

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from tests.common import assert_resumed_equals_uninterrupted
from tests.transformers_llada_uni.training.training_common import BLOCK, RUN
from tests.transformers_llada_uni.training.training_common import tiny_model as small_model
from transformers_llada_uni.generation.trajectory import Trajectory
from transformers_llada_uni.training import LLaDAUniGRPOConfig, LLaDAUniGRPOTrainer, lora_config
from transformers_llada_uni.training.grpo_trainer import checked_reward


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


def labels_of(logits_to_keep=6):
    labels = INPUT_IDS.masked_fill(ATTENTION_MASK == 0, -100)
    labels[:, :-logits_to_keep] = -100
    return labels


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


@pytest.mark.parametrize("estimate", ["full_mask", "elbo", "trace"])
def test_an_estimate_depends_on_the_row_alone(tokenizer, tmp_path, estimate):
    trainer = make_trainer(tokenizer, tmp_path, log_probability_estimate=estimate)
    rows = [INPUT_IDS[0].tolist(), INPUT_IDS[1, 2:9].tolist()]
    ids = torch.tensor([[*row, 51, 52, 53, 54, 55][:12] for row in rows])
    steps = torch.tensor([[-1] * 5 + [1, 0, 2, 0, 1, 1, 0], [-1] * 3 + [0, 2, 1, 0, 1, 2, 0, 0, 0]])
    trainer._rollouts["eval"].record(rows, Trajectory(ids, steps))
    trainer.model.eval()
    with torch.no_grad():
        arguments = (trainer.model, INPUT_IDS, ATTENTION_MASK, 6)
        both, _, _ = trainer._get_per_token_logps_and_entropies(*arguments)
        again, _, _ = trainer._get_per_token_logps_and_entropies(*arguments, batch_size=1)
        alone, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, INPUT_IDS[1:, 2:9], ATTENTION_MASK[1:, 2:9], 4
        )
    torch.testing.assert_close(again, both, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(alone[0], both[1, :4], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("estimate", ["full_mask", "elbo", "trace"])
def test_the_ratio_is_one_before_the_first_update(tokenizer, tmp_path, estimate):
    """
    With several iterations old log-probabilities are made when the rollout is; they must equal the new ones, also of
    rows that were shuffled and split in between.
    """
    trainer = make_trainer(
        tokenizer,
        tmp_path,
        num_iterations=2,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=4,
        beta=0.1,
        log_probability_estimate=estimate,
        learning_rate=1e-2,
        max_steps=2,
    )
    seen = []
    original = trainer.compute_loss

    def spy(model, inputs, **kwargs):
        keep = inputs["completion_ids"].shape[1]
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        logps, _, _ = trainer._get_per_token_logps_and_entropies(model, ids, mask, keep)
        old, reference = inputs["old_per_token_logps"], inputs["ref_per_token_logps"]
        seen.append(((logps - old).abs().max().item(), (logps - reference).abs().max().item()))
        return original(model, inputs, **kwargs)

    trainer.compute_loss = spy
    trainer.train()
    # The same rows in the other order, or in batches of other rows, differ in the last bits.
    assert max(seen[0] + seen[1]) < 1e-5
    assert seen[2][0] > 1e-4  # after an update they differ


def test_masks_change_from_rollout_to_rollout(tokenizer, tmp_path):
    trainer = make_trainer(tokenizer, tmp_path, log_probability_estimate="elbo")
    trainer.model.train()
    likelihood, batch = trainer._likelihood, (INPUT_IDS, ATTENTION_MASK, labels_of())
    first, again = (likelihood.lay_out(*batch)[0]["masked"] for _ in range(2))
    trainer._rollouts["train"].step = 1
    later = likelihood.lay_out(*batch)[0]["masked"]
    assert torch.equal(first, again) and not torch.equal(first, later)


def loss_inputs(advantages, old=None):
    """What trl makes of rollouts."""
    inputs = {
        "prompt_ids": INPUT_IDS[:, :5],
        "prompt_mask": ATTENTION_MASK[:, :5],
        "completion_ids": INPUT_IDS[:, 5:],
        "completion_mask": ATTENTION_MASK[:, 5:],
        "advantages": torch.tensor(advantages),
        "num_items_in_batch": torch.tensor(10),
    }
    return inputs if old is None else {**inputs, "old_per_token_logps": old}


def gradients(model):
    found = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    return found


def test_elbo_clips_the_ratio_of_answers(tokenizer, tmp_path):
    """EBPO, eq. 4: min(rho A, clip(rho) A) of each answer, whose gradient is the policy gradient where rho is 1."""
    trainer = make_trainer(tokenizer, tmp_path, log_probability_estimate="elbo", loss_type="grpo", epsilon_high=0.3)
    model = trainer.model
    trainer.current_gradient_accumulation_steps = 1

    def bounds():
        terms = model(INPUT_IDS, ATTENTION_MASK, labels_of(), fused_lm_head=True)
        return terms.log_probs[:, 5]  # each token has that of its answer

    # 1. rho is 1
    trainer.compute_loss(model, loss_inputs([2.0, -1.0])).backward()
    found = gradients(model)
    (-(torch.tensor([2.0, -1.0]) * bounds()).mean()).backward()
    for own, expected in zip(found, gradients(model), strict=True):
        torch.testing.assert_close(own, expected, atol=1e-6, rtol=1e-4)

    # 2. rho is 1.5 and 0.5: clipped where it has gone far enough, in its advantage's direction
    old = bounds().detach()[:, None].expand(-1, 6) - torch.tensor([[1.5], [0.5]]).log()
    for advantages, expected in (([1.0, -1.0], [1.3, -0.8]), ([-1.0, 1.0], [-1.5, 0.5])):
        loss = trainer.compute_loss(model, loss_inputs(advantages, old))
        torch.testing.assert_close(loss, -torch.tensor(expected).mean(), atol=1e-5, rtol=1e-5)
        loss.backward()
        is_still = all(not grad.any() for grad in gradients(model))
        assert is_still == (advantages == [1.0, -1.0])


def test_trace_weighs_steps_alike(tokenizer, tmp_path):
    """TraceRL's objective: the sum over steps of the mean over a step's tokens, here by the number of steps."""
    trainer = make_trainer(tokenizer, tmp_path, log_probability_estimate="trace", loss_type="grpo")
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    rows = [INPUT_IDS[0].tolist(), INPUT_IDS[1, 2:9].tolist()]
    ids = torch.tensor([[*rows[0], 51], [*rows[1], 51, 52, 53, 54, 55]])
    # Answers of 6 and 4 tokens, from places 5 and 3: blocks of 4 end at places 8, 12 and 4, 8.
    steps = torch.tensor([[-1] * 5 + [0, 0, 1, 1, 0, 1, 0], [-1] * 3 + [0, 0, 0, 0, 1] + [-1] * 4])
    trainer._rollouts["train"].record(rows, Trajectory(ids, steps))
    counts = [[2, 2, 1, 2, 1, 2], [1, 3, 3, 3]]  # tokens of each token's step in its block
    num_steps = [4, 2]
    ratios = torch.tensor([[1.1, 1.5, 0.9, 0.5, 1.0, 1.3], [1.0, 0.7, 1.1, 1.25, 1.0, 1.0]])
    terms = trainer.model(INPUT_IDS, ATTENTION_MASK, labels_of(), fused_lm_head=True)
    old = terms.log_probs[:, 5:].detach() - ratios.log()
    loss = trainer.compute_loss(trainer.model, loss_inputs([2.0, -1.0], old))
    expected = 0.0
    for row, advantage in enumerate([2.0, -1.0]):
        for place, count in enumerate(counts[row]):
            ratio = float(ratios[row, place])
            clipped = min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
            expected -= clipped / count / num_steps[row] / 2
    assert loss.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("estimate", ["full_mask", "elbo"])
def test_the_entropy_bonus_has_a_gradient(tokenizer, tmp_path, estimate):
    """trl's `entropy_coef`: to follow what it adds to the gradient raises the entropy."""
    found = []
    for coefficient in (0.0, 1.0):
        model = tiny_model()
        model.lm_head.weight.data *= 20  # a new head has nearly the highest entropy
        settings = {"log_probability_estimate": estimate, "entropy_coef": coefficient}
        trainer = make_trainer(tokenizer, tmp_path, model, **settings)
        trainer.current_gradient_accumulation_steps = 1
        trainer.compute_loss(trainer.model, loss_inputs([2.0, -1.0])).backward()
        found.append(gradients(trainer.model))
    before = trainer.model(INPUT_IDS, ATTENTION_MASK, labels_of(), fused_lm_head=True).entropy
    with torch.no_grad():
        for parameter, without, with_bonus in zip(trainer.model.parameters(), *found, strict=True):
            parameter -= 1e-2 * (with_bonus - without)
        after = trainer.model(INPUT_IDS, ATTENTION_MASK, labels_of(), fused_lm_head=True).entropy
    assert after.sum() > before.sum() + 0.01


def test_the_reference_of_a_trained_adapter_is_that_adapter(tokenizer, tmp_path):
    model = get_peft_model(tiny_model(), lora_config(r=4))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3, generator=generator)
    trainer = make_trainer(tokenizer, tmp_path, model=model, beta=0.1, learning_rate=1e-2, max_steps=2)
    trainer.train()
    first, second = (entry["kl"] for entry in trainer.state.log_history if "kl" in entry)
    assert first == 0.0 and second > 0


@pytest.mark.parametrize("estimate", ["elbo", "trace"])
def test_resumed_run_equals_the_uninterrupted_one(tokenizer, tmp_path, estimate):
    settings = {"learning_rate": 1e-2, "beta": 0.05, "log_probability_estimate": estimate}
    assert_resumed_equals_uninterrupted(partial(make_trainer, tokenizer), tmp_path, **settings)


@pytest.mark.parametrize(("estimate", "with_adapter"), [("full_mask", False), ("elbo", True), ("trace", False)])
def test_the_reward_rises_to_its_optimum(tokenizer, tmp_path, estimate, with_adapter):
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
        log_probability_estimate=estimate,
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


def chat(text):
    return [{"role": "user", "content": text}]


def picture(seed, width=128):
    pixels = np.random.default_rng(seed).integers(0, 256, (128, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def rollouts_of(converted_dir, output_dir, dataset, **settings):
    """The prompts that `generate` is given in the first step, and what the reward is given."""
    prompts, seen = [], []

    def reward(completion_ids, **kwargs):
        seen.append(kwargs)
        return [float(len(set(ids))) for ids in completion_ids]

    settings = {**RUN, "per_device_train_batch_size": 4, "num_generations": 2, "max_steps": 1, **settings}
    trainer = LLaDAUniGRPOTrainer(
        model=AutoModelForImageTextToText.from_pretrained(converted_dir / "model"),
        reward_funcs=reward,
        args=LLaDAUniGRPOConfig(
            str(output_dir), block_length=8, num_steps_per_block=2, max_completion_length=8, **settings
        ),
        train_dataset=dataset,
        processing_class=AutoProcessor.from_pretrained(converted_dir / "processor"),
    )
    original = trainer.rollout_func

    def spy(*args):
        rollouts = original(*args)
        prompts.append(rollouts["prompt_ids"])
        return rollouts

    trainer.rollout_func = spy
    trainer.train()
    return trainer, prompts, seen


@pytest.mark.parametrize("kind", ["texts", "chats", "stream", "shuffled"])
def test_prompts_of_unequal_length_are_not_padded(converted_dir, tmp_path, kind):
    prompts = ["one two", "three four five six seven"]
    rows = [text if kind == "texts" else chat(text) for text in prompts]
    dataset = Dataset.from_dict({"prompt": rows * 4, "answer": prompts * 4})
    if kind == "stream":
        dataset = dataset.to_iterable_dataset()
    if kind == "shuffled":
        dataset = dataset.shuffle(seed=0)
    _, (prompt_ids,), (given,) = rollouts_of(converted_dir, tmp_path, dataset)
    processor = AutoProcessor.from_pretrained(converted_dir / "processor")
    for ids, text in zip(prompt_ids, given["answer"], strict=True):
        words = text
        if kind != "texts":
            words = processor.apply_chat_template(chat(text), add_generation_prompt=True, tokenize=False)
        assert ids == processor.tokenizer(words, add_special_tokens=False)["input_ids"]
    assert "prompt_ids" not in given


@pytest.mark.parametrize("place", ["column", "messages"])
def test_prompts_show_their_images(converted_dir, tmp_path, place):
    """To the model as codes, and to the reward as they are; one row has none."""
    pictures = [picture(0), picture(1, width=192), None, picture(2)]
    rows, given = [], {}
    for shown in pictures:
        image = [{"type": "image", "image": shown}] if shown is not None and place == "messages" else []
        rows.append([{"role": "user", "content": [*image, {"type": "text", "text": "What is it?"}]}])
    if place == "column":
        given["images"] = [[] if shown is None else [shown] for shown in pictures]
        rows = [chat("What is it?") for _ in pictures]
    dataset = Dataset.from_dict({"prompt": rows, **given, "row": list(range(4))})
    trainer, (prompt_ids,), (seen,) = rollouts_of(
        converted_dir, tmp_path, dataset, per_device_train_batch_size=8, beta=0.1, learning_rate=1e-3
    )
    model, processor = AutoModelForImageTextToText.from_pretrained(converted_dir / "model"), trainer.processing_class
    for ids, row in zip(prompt_ids, seen["row"], strict=True):
        shown = pictures[row]
        inputs = processor(
            text="What is it?", images=None if shown is None else [shown], task="understanding", return_tensors="pt"
        )
        expected = inputs["input_ids"]
        if shown is not None:
            images = inputs["pixel_values"], inputs["image_grid_thw"]
            expected = model.model.place_images({"input_ids": expected}, *images)["input_ids"]
        assert ids == expected[0].tolist()
        if place == "column":
            assert [image.size for image in seen["images"][seen["row"].index(row)]] == (
                [] if shown is None else [shown.size]
            )
    assert trainer.state.log_history[0]["kl"] == 0.0


@pytest.mark.parametrize(("guidance_scale", "estimate"), [(1.0, "trace"), (2.0, "full_mask")])
def test_images_are_rolled_out_and_rewarded(converted_dir, tmp_path, guidance_scale, estimate):
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
            log_probability_estimate=estimate,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["a cat", "a dog"] * 4, "grid": [[2, 3], [3, 2]] * 4}),
        processing_class=processor,
        decode_images=decode_images,
    )
    before = model.model.language_model.layers[0].attention.dense.weight.detach().clone()
    trainer.train()
    assert len(seen) == 8
    assert not torch.equal(before, model.model.language_model.layers[0].attention.dense.weight)


def test_the_reward_of_images_rises_to_its_optimum(converted_dir, tmp_path):
    """With MaskGRPO's truncated noise."""

    def share_of_low_codes(image_codes, **kwargs):
        return [float((codes < 128).float().mean()) for codes in image_codes]

    trainer = LLaDAUniGRPOTrainer(
        model=AutoModelForImageTextToText.from_pretrained(converted_dir / "model"),
        reward_funcs=share_of_low_codes,
        args=LLaDAUniGRPOConfig(
            str(tmp_path),
            **{**RUN, "per_device_train_batch_size": 16, "num_generations": 8, "max_steps": 12, "learning_rate": 1e-3},
            block_length=8,
            num_steps_per_block=2,
            log_probability_estimate="elbo",
        ),
        train_dataset=Dataset.from_dict({"prompt": ["a cat", "a dog"] * 8, "grid": [[2, 3], [3, 2]] * 8}),
        processing_class=AutoProcessor.from_pretrained(converted_dir / "processor"),
    )
    trainer.train()
    assert trainer._likelihood.noise.noise_range == (0.8, 1.0)
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert rewards[0] < 0.8 and sum(rewards[-3:]) / 3 > 0.95


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"use_vllm": True}, "use_vllm"),
        ({"min_p": 0.1}, "min_p"),
        ({"log_probability_estimate": "exact"}, "log_probability_estimate"),
        ({"num_noise_samples": 0}, "num_noise_samples"),
        ({"num_noise_samples": 8}, "num_noise_samples"),
        ({"log_probability_estimate": "elbo", "noise_range": [0.9, 0.2]}, "noise_range"),
        ({"noise_range": [0.2, 0.9]}, "noise_range"),
        ({"log_probability_estimate": "trace", "trace_shrinkage": 0}, "trace_shrinkage"),
        ({"log_probability_estimate": "elbo", "trace_shrinkage": 2}, "trace_shrinkage"),
        ({"threshold": 1.5}, "threshold"),
        ({"num_steps_per_block": 0}, "num_steps_per_block"),
        ({"guidance_scale": -1.0}, "guidance_scale"),
        ({"sync_ref_model": True}, "sync_ref_model"),
        ({"router_aux_loss_coef": 0.1}, "router_aux_loss_coef"),
        ({"remove_unused_columns": True}, "remove_unused_columns"),
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


def test_sharded_models_are_refused(tokenizer, tmp_path):
    model = tiny_model()
    model._is_distributed_loading_by_transformers = True
    with pytest.raises(ValueError, match="`model` is sharded"):
        make_trainer(tokenizer, tmp_path, model=model)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": [chat("a cat")], "grid": [[2, 2]]}, "Row 0: `prompt` must be a text"),
        ({"prompt": ["a", "b"], "grid": [[2, 2], [0, 2]]}, "Row 1: `grid`"),
        ({"prompt": ["a", "b"], "grid": [[2, 2], None]}, "Row 1: `grid`"),
        ({"prompt": [chat("Red")], "image": [picture(0)], "grid": [[2, 2]]}, "edited images are not supported"),
        ({"prompt": ["What is it?"], "image": [picture(0)]}, "Row 0: .*give messages"),
        ({"prompt": [[{"role": "assistant", "content": "Hm"}]]}, "Row 0: `prompt`"),
    ],
)
def test_bad_rows_are_refused_before_the_run(converted_dir, tmp_path, columns, message):
    with pytest.raises(ValueError, match=message):
        rollouts_of(converted_dir, tmp_path, Dataset.from_dict(columns))


def test_decoder_must_return_a_image_per_grid(converted_dir, tmp_path):
    dataset = Dataset.from_dict({"prompt": ["a cat"] * 4, "grid": [[2, 2]] * 4})
    trainer, _, _ = rollouts_of(converted_dir, tmp_path, dataset)
    trainer.decode_images = lambda codes: []
    with pytest.raises(ValueError, match="`decode_images` returned 0 images for 4"):
        trainer.train()
    with pytest.raises(ValueError, match="`eval_dataset` must have a column `grid`"):
        trainer.evaluate(dataset.remove_columns("grid"))


@pytest.mark.parametrize(
    "given",
    [0.5, [0.5], None, ["good", "bad"], [float("inf"), 0.0], [float("nan"), 0.0], "10", torch.ones(2, 2)],
    ids=str,
)
def test_a_reward_that_gives_something_else_is_named(given):
    def judge(**columns):
        return given

    async def judge_later(**columns):
        return given

    message = "`judge` must give a list of 2, for each completion a finite number, or None"
    with pytest.raises(ValueError, match=message):
        checked_reward(judge, "judge")(prompts=["a", "a"], completions=["b", "c"])
    with pytest.raises(ValueError, match=message):
        asyncio.run(checked_reward(judge_later, "judge")(prompts=["a", "a"], completions=["b", "c"]))


def test_what_a_reward_may_give(tokenizer, tmp_path):
    for given in ([1, None], (0.5, True), torch.tensor([0.5, 2]), np.array([1.0, 0.0]), (number for number in (1, 2))):
        checked = checked_reward(lambda given=given, **columns: given, "judge")(completions=["b", "c"])
        assert len(checked) == 2
    with pytest.raises(ValueError, match="The reward function `first` must give a list of 8"):

        def first(completions, **columns):
            return float(len(completions[0]))

        make_trainer(tokenizer, tmp_path, reward=first).train()
