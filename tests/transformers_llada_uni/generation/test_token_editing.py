"""Token editing, against a literal loop over one row with whole forwards."""

import pytest
import torch

from tests.transformers_llada_uni.generation.property_cases import tiny_backbone
from transformers_llada_uni.generation.sampling import commit_schedule


BLOCK_LENGTH = 8


@pytest.fixture(scope="module")
def model():
    return tiny_backbone()


def fill_literally(model, prompt: list[int], num_new_tokens: int, **settings) -> tuple[list[int], int]:
    """The rule as diffusers' BlockRefinementScheduler states it, token by token; and how many were replaced."""
    mask_token_id, num_edits = model.config.mask_token_id, 0
    length = -(-(len(prompt) + num_new_tokens) // BLOCK_LENGTH) * BLOCK_LENGTH
    ids = prompt + [mask_token_id] * (length - len(prompt))
    schedule = commit_schedule(BLOCK_LENGTH, settings["num_steps_per_block"])
    for start in range(len(prompt) // BLOCK_LENGTH * BLOCK_LENGTH, length, BLOCK_LENGTH):
        stop, post_steps, step = start + BLOCK_LENGTH, 0, 0
        while True:
            masks = [column for column in range(start, stop) if ids[column] == mask_token_id]
            if not masks and post_steps == settings["max_post_steps"]:
                break
            post_steps += not masks
            with torch.no_grad():
                logits = model(torch.tensor([ids[:stop]]), block_length=BLOCK_LENGTH).logits[0]
            logits[:, mask_token_id] = float("-inf")
            probabilities, tokens = logits.softmax(dim=-1).max(dim=-1)
            probabilities, tokens = probabilities.tolist(), tokens.tolist()
            chosen = [column for column in masks if probabilities[column] > settings["threshold"]]
            if masks and len(chosen) < min(schedule[step], len(masks)):
                chosen = sorted(masks, key=lambda column: -probabilities[column])[: schedule[step]]
            edits = [
                column
                for column in range(max(start, len(prompt)), stop)
                if column not in masks
                and tokens[column] != ids[column]
                and probabilities[column] > settings["editing_threshold"]
            ]
            for column in chosen + edits:
                ids[column] = tokens[column]
            num_edits += len(edits)
            step += 1
            if not masks and not edits:
                break
    return ids[: len(prompt) + num_new_tokens], num_edits


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(
    "editing_threshold, max_post_steps, num_steps_per_block", [(0.0, 3, 4), (0.02, 16, 4), (0.02, 0, 8), (0.03, 1, 1)]
)
def test_equals_the_literal_loop(model, use_cache, editing_threshold, max_post_steps, num_steps_per_block):
    generator, num_edits = torch.Generator().manual_seed(0), 0
    settings = {
        "editing_threshold": editing_threshold,
        "max_post_steps": max_post_steps,
        "num_steps_per_block": num_steps_per_block,
        "threshold": 0.9,
    }
    for length in (3, 8, 13):
        prompt = torch.randint(0, 60, (1, length), generator=generator)
        expected, edits = fill_literally(model, prompt[0].tolist(), 20, **settings)
        found = model.generate(
            prompt, max_new_tokens=20, block_length=BLOCK_LENGTH, eos_token_id=[], use_cache=use_cache, **settings
        )
        assert found[0].tolist() == expected
        num_edits += edits
    assert num_edits > 0


def test_a_row_in_a_batch_equals_the_row_alone(model):
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 60, (length,), generator=generator) for length in (4, 11, 9)]
    settings = {"max_new_tokens": 20, "block_length": BLOCK_LENGTH, "eos_token_id": [], "num_steps_per_block": 3}
    settings |= {"editing_threshold": 0.02, "max_post_steps": 4}
    width = max(map(len, prompts))
    input_ids = torch.stack([torch.nn.functional.pad(prompt, (width - len(prompt), 0)) for prompt in prompts])
    attention_mask = torch.stack([(torch.arange(width) >= width - len(prompt)).long() for prompt in prompts])
    together = model.generate(input_ids, attention_mask, **settings)
    for row, prompt in zip(together, prompts, strict=True):
        alone = model.generate(prompt[None], **settings)
        assert row[width - len(prompt) :].tolist() == alone[0].tolist()


def test_a_threshold_that_is_never_met_changes_nothing(model):
    prompt = torch.arange(10)[None]
    settings = {"max_new_tokens": 20, "block_length": BLOCK_LENGTH, "eos_token_id": [], "num_steps_per_block": 3}
    plain = model.generate(prompt, **settings)
    assert torch.equal(model.generate(prompt, editing_threshold=1.0, **settings), plain)
    assert not torch.equal(model.generate(prompt, editing_threshold=0.0, **settings), plain)


def test_image_codes_are_edited_with_guidance_and_stay_codes(model):
    offset = model.config.image_token_offset
    settings = {"guidance_scale": 2.0, "negative_input_ids": torch.arange(7)[None], "block_length": BLOCK_LENGTH}
    settings |= {"num_steps_per_block": 2}
    plain = model.generate_image_codes(torch.arange(10)[None], (4, 4), **settings)
    edited = model.generate_image_codes(torch.arange(10)[None], (4, 4), editing_threshold=0.0, **settings)
    uncached = model.generate_image_codes(
        torch.arange(10)[None], (4, 4), editing_threshold=0.0, use_cache=False, **settings
    )
    assert not torch.equal(plain, edited)
    assert torch.equal(edited, uncached)
    assert int(edited.min()) >= 0 and int(edited.max()) < model.config.vocab_size - offset


@pytest.mark.parametrize(
    "name, value", [("editing_threshold", 1.5), ("editing_threshold", -0.1), ("max_post_steps", -1)]
)
def test_values_out_of_range_are_named(model, name, value):
    with pytest.raises(ValueError, match=f"`{name}`"):
        model.generate(torch.arange(4)[None], **{name: value})
