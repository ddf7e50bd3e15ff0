"""Credit decoding, against a literal loop over one row with whole forwards and a credit for every token."""

import math

import pytest
import torch

from tests.transformers_llada_uni.generation.property_cases import tiny_backbone
from tests.transformers_llada_uni.generation.recorded_steps import TracedProgram, recorded_on_cpu
from tests.transformers_llada_uni.generation.test_runners import left_padded
from transformers_llada_uni.generation.continuous_batch import ContinuousBatch
from transformers_llada_uni.generation.credit import CreditDecoding
from transformers_llada_uni.generation.sampling import commit_schedule
from transformers_llada_uni.generation.state import BlockState


BLOCK_LENGTH, NUM_STEPS, NUM_NEW_TOKENS = 8, 8, 20
PROMPTS = [torch.randint(0, 60, (length,), generator=torch.Generator().manual_seed(length)) for length in (4, 11, 9)]
SETTINGS = {"block_length": BLOCK_LENGTH, "num_steps_per_block": NUM_STEPS, "threshold": 0.3, "eos_token_id": []}
SETTINGS |= {"max_new_tokens": NUM_NEW_TOKENS}


@pytest.fixture(scope="module")
def model():
    model = tiny_backbone()
    model.set_experts_implementation("batched_mm")  # can be recorded
    yield model
    model.release_cuda_graphs()


@torch.no_grad()
def write_literally(model, prompt: list[int], alpha: float) -> tuple[list[int], int]:
    """The new tokens, and the forward passes they took."""
    mask_token_id, num_passes = model.config.mask_token_id, 0
    length = -(-(len(prompt) + NUM_NEW_TOKENS) // BLOCK_LENGTH) * BLOCK_LENGTH
    ids = prompt + [mask_token_id] * (length - len(prompt))
    for start in range(len(prompt) // BLOCK_LENGTH * BLOCK_LENGTH, length, BLOCK_LENGTH):
        stop = start + BLOCK_LENGTH
        credits: dict[tuple[int, int], float] = {}  # of a column and a token
        for count in commit_schedule(BLOCK_LENGTH, NUM_STEPS):
            masks = [column for column in range(start, stop) if ids[column] == mask_token_id]
            if not masks:
                break
            num_passes += 1
            logits = model(torch.tensor([ids[:stop]]), block_length=BLOCK_LENGTH).logits[0].double()
            logits[:, mask_token_id] = float("-inf")
            best = logits.softmax(dim=-1).max(dim=-1)
            credits = {place: 0.8 * credit for place, credit in credits.items()}
            for column in masks:
                place = column, int(best.indices[column])
                credits[place] = credits.get(place, 0.0) + float(best.values[column]) ** 0.2
            for (column, token), credit in credits.items():
                logits[column, token] += alpha * math.log(1 + credit)
            values, tokens = (part.tolist() for part in logits.softmax(dim=-1).max(dim=-1))
            chosen = [column for column in masks if values[column] > SETTINGS["threshold"]]
            if len(chosen) < min(count, len(masks)):
                chosen = sorted(masks, key=lambda column: -values[column])[:count]
            for column in chosen:
                ids[column] = tokens[column]
    return ids[len(prompt) : len(prompt) + NUM_NEW_TOKENS], num_passes


def test_equals_the_literal_loop_in_fewer_passes(model):
    passes = {0.0: 0, 2.0: 0}
    for prompt in PROMPTS:
        for alpha in passes:
            expected, num_passes = write_literally(model, prompt.tolist(), alpha)
            found = model.generate(prompt[None], credit_alpha=alpha, return_dict_in_generate=True, **SETTINGS)
            assert found.sequences[0, len(prompt) :].tolist() == expected
            assert found.num_forward_passes == num_passes
            passes[alpha] += num_passes
    assert passes[2.0] < passes[0.0]


@pytest.mark.parametrize("settings", [{}, {"do_sample": True}, {"editing_threshold": 0.05, "max_post_steps": 2}])
def test_no_weight_is_no_credit(model, settings):
    def generate(**more) -> torch.Tensor:
        return model.generate(
            PROMPTS[1][None], generator=torch.Generator().manual_seed(0), **SETTINGS, **settings, **more
        )

    plain = generate()
    assert torch.equal(generate(credit_alpha=0.0), plain)
    credited = generate(credit_alpha=2.0)
    assert not torch.equal(credited, plain)
    assert torch.equal(generate(credit_alpha=2.0, use_cache=False), credited)


@pytest.mark.parametrize("more", [{}, {"remasking_threshold": 0.7}], ids=["alone", "with re-masking"])
def test_a_row_in_a_batch_equals_the_row_alone(model, more):
    """What a step predicts besides masks goes by the other rows; it earns nothing, though it be masked once more."""
    settings = SETTINGS | {"credit_alpha": 2.0} | more
    together = model.generate(**left_padded(PROMPTS), **settings)[:, -NUM_NEW_TOKENS:]
    with recorded_on_cpu():
        count = TracedProgram.count
        recorded = model.generate(**left_padded(PROMPTS), use_cuda_graphs=True, **settings)
        assert TracedProgram.count > count
    assert torch.equal(recorded[:, -NUM_NEW_TOKENS:], together)
    batch = ContinuousBatch(model, **settings)
    rows = [batch.add(prompt) for prompt in PROMPTS]
    while batch.rows:
        batch.step()
    for prompt, row, joined in zip(PROMPTS, together, rows, strict=True):
        alone = model.generate(prompt[None], **settings)[0, len(prompt) :]
        assert alone.tolist() == row.tolist() == joined.tokens


def test_only_masks_have_credit():
    state = BlockState(1, 1, 2, 3, torch.device("cpu"), False, has_credits=True)
    state.masked[0, 1] = True
    logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 3.0]])
    found = CreditDecoding(1.0)(state, logits, None)
    share = logits[1].softmax(dim=-1)[2] ** 0.2
    torch.testing.assert_close(found - logits, torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, float(share.log1p())]]))


def test_values_out_of_range_are_named(model):
    with pytest.raises(ValueError, match="`credit_alpha`"):
        model.generate(PROMPTS[0][None], credit_alpha=-1.0)
