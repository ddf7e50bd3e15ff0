"""What the steps of a block forward: rows that have nothing left to predict in it are left out."""

from contextlib import contextmanager

import pytest
import torch

from tests.transformers_llada_uni.generation.property_cases import tiny_backbone


IDS = torch.arange(10, 17)
# With blocks of 8 the first block has 7, 3, 1 and 1 masks.
PROMPTS = [IDS[:1], IDS[:5], IDS, IDS.flip(0)]
SETTINGS = {"block_length": 8, "num_steps_per_block": 8, "threshold": 1.0, "eos_token_id": []}


@pytest.fixture(scope="module")
def model():
    return tiny_backbone()


@contextmanager
def rows_of_forwards(model):
    """Of each forward pass of the backbone the number of its rows."""
    found: list[int] = []

    def note(module, args, kwargs):
        found.append(len(kwargs["input_ids"]))

    handle = model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
    yield found
    handle.remove()


def left_padded(prompts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=62, padding_side="left")
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(one) for one in prompts], True, 0, padding_side="left")
    return {"input_ids": ids, "attention_mask": mask}


def test_of_a_schedule(model):
    with rows_of_forwards(model) as rows:
        found = model.generate(**left_padded(PROMPTS), max_new_tokens=12, **SETTINGS)
    # The first row ends with the second block; the others have a third.
    assert rows == [4, 2, 2, 1, 1, 1, 1] + [4] * 8 + [3] * 8
    for prompt, row in zip(PROMPTS, found, strict=True):
        assert torch.equal(model.generate(prompt[None], max_new_tokens=12, **SETTINGS)[0, len(prompt) :], row[7:])


@pytest.mark.parametrize(
    "settings", [{"threshold": 0.1}, {"do_sample": True}, {"threshold": 0.1, "editing_threshold": 0.02}]
)
def test_that_ends_when_it_is_sure(model, settings):
    settings = SETTINGS | settings

    def generate(prompts: list[torch.Tensor], first: int) -> tuple[torch.Tensor, list[int]]:
        generators = [torch.Generator().manual_seed(first + index) for index in range(len(prompts))]
        with rows_of_forwards(model) as rows:
            return model.generate(**left_padded(prompts), max_new_tokens=12, generator=generators, **settings), rows

    found, rows = generate(PROMPTS, 0)
    computed = 0
    for index, (prompt, row) in enumerate(zip(PROMPTS, found, strict=True)):
        alone, rows_alone = generate([prompt], index)
        computed += len(rows_alone)
        assert torch.equal(alone[0, len(prompt) :], row[7:])
    assert sum(rows) == computed < 4 * len(rows)  # no row is computed in a step that it would not take alone


def test_of_all_branches_of_guidance(model):
    arguments = {"grid": (3, 4), "guidance_scale": 2.0, "num_steps_per_block": 8, "block_length": 8, "threshold": 1.0}
    negative = left_padded([IDS[:2]] * 4)
    negative = {f"negative_{name}": value for name, value in negative.items()}
    with rows_of_forwards(model) as rows:
        found = model.generate_image_codes(**left_padded(PROMPTS), **negative, **arguments)
    assert rows == [8, 4, 4, 2, 2, 2, 2] + [8] * 8 + [6] * 8
    for prompt, codes in zip(PROMPTS, found, strict=True):
        alone = model.generate_image_codes(prompt[None], negative_input_ids=IDS[None, :2], **arguments)
        assert torch.equal(alone[0], codes)


def test_the_plain_loop_computes_all(model):
    with rows_of_forwards(model) as rows:
        model.generate(**left_padded(PROMPTS), max_new_tokens=1, use_cache=False, **SETTINGS)
    assert rows == [4] * 7
