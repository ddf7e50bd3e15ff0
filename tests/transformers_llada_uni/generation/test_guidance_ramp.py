"""Guidance over time, against a literal loop over one row with whole forwards; and what its branches cost."""

import pytest
import torch

from tests.transformers_llada_uni.generation.property_cases import tiny_backbone
from tests.transformers_llada_uni.generation.recorded_steps import TracedProgram, recorded_on_cpu
from tests.transformers_llada_uni.generation.test_runners import left_padded, rows_of_forwards
from transformers_llada_uni import BlockDiffusionGenerationConfig
from transformers_llada_uni.generation.canvas import Canvas
from transformers_llada_uni.generation.guidance_ramp import first_guided_block, guidance_weights
from transformers_llada_uni.generation.sampling import commit_schedule


BLOCK_LENGTH, NUM_STEPS, GRID, SCALE, RESCALE = 8, 3, (4, 6), 3.0, 0.7
NUM_CODES = GRID[0] * GRID[1]
PROMPT = torch.arange(20, 33)
NEGATIVE = torch.arange(40, 45)  # its blocks are those of the prompt
SETTINGS = {"grid": GRID, "block_length": BLOCK_LENGTH, "num_steps_per_block": NUM_STEPS, "threshold": 1.0}
SETTINGS |= {"guidance_scale": SCALE, "guidance_rescale": RESCALE}


@pytest.fixture(scope="module")
def model():
    model = tiny_backbone()
    model.set_experts_implementation("batched_mm")  # can be recorded
    yield model
    model.release_cuda_graphs()


def draw(model, ramp: tuple[float, float] | None, **settings) -> list[int]:
    arguments = {"input_ids": PROMPT[None], "negative_input_ids": NEGATIVE[None]} | SETTINGS | settings
    return model.generate_image_codes(guidance_ramp=ramp, **arguments)[0].tolist()


@torch.no_grad()
def draw_literally(model, ramp: tuple[float, float]) -> list[int]:
    """All branches in all steps, guidance by what is known of the image."""
    mask_token_id, offset = model.config.mask_token_id, model.config.image_token_offset
    first = len(PROMPT) % BLOCK_LENGTH
    room = -(-(first + NUM_CODES) // BLOCK_LENGTH) * BLOCK_LENGTH - first
    branches = [torch.cat([prompt, torch.full((room,), mask_token_id)]) for prompt in (PROMPT, NEGATIVE)]
    for start in range(-first, room, BLOCK_LENGTH):
        stop = start + BLOCK_LENGTH
        for count in commit_schedule(BLOCK_LENGTH, NUM_STEPS):
            masks = [
                place for place in range(max(start, 0), stop) if branches[0][len(PROMPT) + place] == mask_token_id
            ]
            if not masks:
                break
            # What is masked behind the image, in its last block, may be what is left of the block.
            codes_of_block = min(stop, NUM_CODES) - max(start, 0)
            known = (NUM_CODES - max(NUM_CODES - stop, 0) - min(len(masks), codes_of_block)) / NUM_CODES
            weight = float(known >= ramp[1])
            if ramp[0] < ramp[1]:
                weight = min(max((known - ramp[0]) / (ramp[1] - ramp[0]), 0.0), 1.0)
            logits = []
            for ids, length in zip(branches, (len(PROMPT), len(NEGATIVE)), strict=True):
                whole = model(ids[None, : length + stop], block_length=BLOCK_LENGTH).logits[0]
                logits.append(whole[[length + place for place in masks]])
            guided = logits[0] + weight * (SCALE - 1) * (logits[0] - logits[1])
            if weight > 0:
                spread = logits[0].std(dim=-1) / (guided.std(dim=-1) + 1e-6)
                guided = guided * (RESCALE * spread + 1 - RESCALE)[:, None]
            probabilities, tokens = guided[:, offset:].softmax(dim=-1).max(dim=-1)
            for index in probabilities.argsort(descending=True)[:count].tolist():
                for ids, length in zip(branches, (len(PROMPT), len(NEGATIVE)), strict=True):
                    ids[length + masks[index]] = tokens[index] + offset
    return (branches[0][len(PROMPT) :][:NUM_CODES] - offset).tolist()


# Of the 24 codes the blocks end behind 3, 11, 19 and 24.
@pytest.mark.parametrize("ramp", [(0.0, 1.0), (0.25, 0.75), (0.5, 0.5)])
def test_equals_the_literal_loop(model, ramp):
    expected = draw_literally(model, ramp)
    assert expected != draw(model, None)
    assert draw(model, ramp) == draw(model, ramp, use_cache=False) == expected


def test_recorded_steps_find_their_weights_in_a_tensor(model):
    wanted = [draw(model, ramp) for ramp in ((0.5, 0.5), (0.4, 0.9))]
    with recorded_on_cpu():
        for _ in range(2):
            assert draw(model, (0.5, 0.5), use_cuda_graphs=True) == wanted[0]
        count = TracedProgram.count
        assert draw(model, (0.4, 0.9), use_cuda_graphs=True) == wanted[1] != wanted[0]
    assert TracedProgram.count == count > 0  # all ramps share what is recorded


def test_the_ends_are_all_and_none(model):
    assert draw(model, (0.0, 0.0)) == draw(model, None)
    arguments = SETTINGS | {"guidance_scale": 1.0}
    assert draw(model, (1.0, 1.0)) == model.generate_image_codes(PROMPT[None], **arguments)[0].tolist()


def test_branches_without_weight_are_not_computed(model):
    def rows(ramp: tuple[float, float] | None) -> list[int]:
        with rows_of_forwards(model) as found:
            draw(model, ramp)
        return found

    assert rows(None) == [2] * 10  # the first block has 3 codes, and takes one step
    assert rows((0.5, 0.5)) == [1] * 4 + [2] * 6  # the second step of the third block begins with 14 of 24
    assert rows((1.0, 1.0)) == [1] * 10


@pytest.mark.parametrize("num_branches", [2, 3])
def test_a_row_in_a_batch_equals_the_row_alone(model, num_branches):
    prompts = [PROMPT[:3], PROMPT, PROMPT[:6]]
    # Rows come to their guidance in other steps, and end in other blocks.
    settings = SETTINGS | {"guidance_ramp": (0.3, 0.6), "threshold": 0.3, "grid": (3, 6)}
    batch = {"negative_input_ids": NEGATIVE.repeat(3, 1)}
    if num_branches == 3:
        batch |= {"negative_image_input_ids": PROMPT.flip(0).repeat(3, 1)}
        settings |= {"image_guidance_scale": 1.5}
    together = model.generate_image_codes(**left_padded(prompts), **batch, **settings)
    with recorded_on_cpu():
        static = model.generate_image_codes(**left_padded(prompts), **batch, **settings, use_cuda_graphs=False)
    assert torch.equal(static, together)
    for row, prompt in zip(together, prompts, strict=True):
        alone = {name: ids[:1] for name, ids in batch.items()}
        assert torch.equal(model.generate_image_codes(prompt[None], **alone, **settings)[0], row)


@pytest.mark.parametrize(
    "settings",
    [{"remasking_threshold": 0.05}, {"editing_threshold": 0.1, "max_post_steps": 2}, {"masking_schedule": "cosine"}],
)
def test_goes_with_other_settings(model, settings):
    settings |= {"credit_alpha": 0.7}
    assert draw(model, (0.5, 0.5), **settings) == draw(model, (0.5, 0.5), use_cache=False, **settings)


def test_goes_with_sprint(model):
    sprint = {"cache_implementation": "sprint", "cache_config": {"keep_ratio": 1.0}}
    prompt = PROMPT[None, :BLOCK_LENGTH]  # all blocks are whole: both ways to fill one evenly are the same
    assert draw(model, (0.5, 0.5), input_ids=prompt, **sprint) == draw(model, (0.5, 0.5), input_ids=prompt)


def test_three_branches_have_no_sprint_before_they_are_guided(model):
    arguments = {"negative_image_input_ids": PROMPT.flip(0)[None], "image_guidance_scale": 1.5}
    sprint = {"cache_implementation": "sprint", "cache_config": {"keep_ratio": 0.3}}
    assert draw(model, (0.5, 0.5), **arguments, **sprint) == draw(model, (0.5, 0.5), **arguments)


def test_a_file_holds_a_ramp(model, tmp_path):
    BlockDiffusionGenerationConfig(guidance_ramp=(0.5, 0.5)).save_pretrained(tmp_path)
    config = BlockDiffusionGenerationConfig.from_pretrained(tmp_path)
    arguments = {"input_ids": PROMPT[None], "negative_input_ids": NEGATIVE[None], "generation_config": config}
    assert model.generate_image_codes(**arguments, **SETTINGS)[0].tolist() == draw(model, (0.5, 0.5))
    model.generate_image_codes(**arguments, **{**SETTINGS, "guidance_scale": 1})  # a call may do without guidance


def test_weights_count_the_codes_that_are_known():
    canvas = Canvas.lay_out([[torch.arange(6)]], 12, block_length=8, mask_token_id=63)
    canvas.masked[0, 6] = False  # a code that is given
    weights = guidance_weights((0.0, 1.0), canvas, 8, [4, 4])
    # Blocks hold 1, 8 and 2 codes to find, the last one 6 masks besides.
    assert (weights[:, :, 0] * 12).round().tolist() == [[1, 2], [2, 6], [10, 10]]
    assert first_guided_block(weights) == 0
    canvas.masked[:] = False
    assert first_guided_block(guidance_weights((0.0, 1.0), canvas, 8, [4, 4])) == 3


@pytest.mark.parametrize("ramp", [0.5, (0.5,), (0.6, 0.5), (-0.1, 1.0), (0.0, 1.5)])
def test_values_out_of_range_are_named(model, ramp):
    with pytest.raises(ValueError, match="`guidance_ramp`"):
        draw(model, ramp)


def test_text_takes_none(model):
    with pytest.raises(TypeError, match="`guidance_ramp`: only image codes"):
        model.generate(PROMPT[None], guidance_ramp=(0.0, 1.0))
