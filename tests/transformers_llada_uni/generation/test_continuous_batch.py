"""Rows that join and leave a batch get what `generate` gives each alone."""

import random

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.transformers_llada_uni.generation.property_cases import tiny_backbone
from transformers_llada_uni.generation.continuous_batch import ContinuousBatch


def prompt(rng: random.Random, length: int) -> torch.Tensor:
    return torch.tensor([rng.randrange(60) for _ in range(length)])


def alone(model, row, **settings) -> list[int]:
    settings["generator"] = [torch.Generator().manual_seed(row.generator.initial_seed())]
    sequence = model.generate(row.prompt[None], max_new_tokens=row.max_new_tokens, **settings)
    return sequence[0, len(row.prompt) :].tolist()


@pytest.mark.parametrize("seed", range(6))
def test_rows_that_come_and_go(seed):
    rng = random.Random(seed)
    model = tiny_backbone(seed % 3)
    settings = {
        "block_length": rng.choice([1, 4, 8, 16]),
        "num_steps_per_block": rng.choice([2, 4, 8]),
        "threshold": rng.choice([0.05, 0.3, 1.0]),
        "do_sample": seed % 3 == 2,
    }
    batch, rows = ContinuousBatch(model, **settings), []
    for _ in range(100):
        if len(rows) < 6 and rng.random() < 0.5:
            for _ in range(rng.choice([1, 1, 2])):
                generator = torch.Generator().manual_seed(len(rows)) if rng.random() < 0.5 else None
                ids = prompt(rng, rng.choice([1, 3, 17, 33, 70]))
                rows.append(batch.add(ids, max_new_tokens=rng.randint(1, 40), generator=generator))
        if len(rows) >= 6 and not batch.rows:
            break
        batch.step()
    assert len(rows) >= 6 and all(row.is_finished for row in rows)
    assert batch._running is None
    for row in rows:
        assert row.tokens == alone(model, row, **settings)


def test_rows_that_have_filled_their_block_are_left_out_of_it():
    model, tokens = tiny_backbone(), []
    model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: tokens.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    batch = ContinuousBatch(model, block_length=8, num_steps_per_block=8, threshold=1.0, eos_token_id=[])
    rows = [batch.add(torch.arange(10, 10 + length), max_new_tokens=9) for length in (5, 7, 14)]
    batch.step()  # they have 3, 1 and 2 masks in their first blocks, the last after a block of its own
    assert tokens == [(3, 16), (2, 8), (1, 8)]
    assert [len(row.tokens) for row in rows] == [3, 1, 2]


def test_a_step_that_was_stopped_can_be_taken_again():
    model, calls = tiny_backbone(), []

    def stops(module, args, kwargs):
        calls.append(tuple(kwargs["input_ids"].shape))
        if len(calls) == 3:  # one row alone is left
            raise KeyboardInterrupt

    model.get_decoder().register_forward_pre_hook(stops, with_kwargs=True)
    settings = {"block_length": 8, "num_steps_per_block": 8, "threshold": 1.0, "eos_token_id": []}
    batch = ContinuousBatch(model, **settings)
    rows = [batch.add(torch.arange(10, 10 + length), max_new_tokens=9) for length in (5, 7, 14)]
    with pytest.raises(KeyboardInterrupt):
        batch.step()
    assert calls[-1] == (1, 8)
    while batch.rows:
        batch.step()
    for row in rows:
        expected = model.generate(row.prompt[None], max_new_tokens=9, **settings)
        assert row.tokens == expected[0, len(row.prompt) :].tolist()


def test_a_row_that_is_removed_disturbs_nobody():
    model, rng = tiny_backbone(), random.Random(0)
    batch = ContinuousBatch(model, block_length=8, num_steps_per_block=4, eos_token_id=None)
    first, second = batch.add(prompt(rng, 40), 48), batch.add(prompt(rng, 9), 48)
    batch.step()
    third = batch.add(prompt(rng, 5), 24)
    waiting = batch.add(prompt(rng, 5), 24)
    batch.step()
    batch.remove(first)
    batch.remove(waiting)
    assert batch._running.canvas.num_columns < 40 + 48  # the room of the long row is given back
    while batch.rows:
        batch.step()
    assert len(first.tokens) == 16 and not first.is_finished
    for row in (second, third):
        assert row.tokens == alone(model, row, block_length=8, num_steps_per_block=4, eos_token_id=None)


def test_without_a_generator_each_row_draws_its_own():
    def draw(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        batch = ContinuousBatch(tiny_backbone(), do_sample=True, temperature=3.0, block_length=8, eos_token_id=None)
        torch.manual_seed(seed)
        rows = [batch.add(torch.arange(8), max_new_tokens=16) for _ in range(2)]
        while batch.rows:
            batch.step()
        return [row.tokens for row in rows]

    assert draw(0) == draw(0)
    assert len(set(map(tuple, draw(0) + draw(1)))) == 4


def attention_of_all(module, query, key, value, attention_mask, scaling, **kwargs):
    """As flash attention: nothing hides keys but padding, `(rows, keys)`."""
    key, value = (states.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for states in (key, value))
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask[:, None, None].bool(), -1e9)
    return (scores.softmax(dim=-1) @ value).transpose(1, 2), None


def test_under_flash_attention_blocks_go_one_by_one(monkeypatch):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_of_all", attention_of_all)
    model, rng, settings = tiny_backbone(), random.Random(0), {"block_length": 8, "num_steps_per_block": 4}
    prompts = [prompt(rng, length) for length in (9, 33, 50)]
    wanted = [model.generate(ids[None], max_new_tokens=20, **settings)[0, len(ids) :].tolist() for ids in prompts]
    model.config._attn_implementation = "flash_attention_of_all"
    batch, rows = ContinuousBatch(model, **settings), []
    for ids in prompts:
        rows.append(batch.add(ids, max_new_tokens=20))
        batch.step()
    while batch.rows:
        batch.step()
    assert [row.tokens for row in rows] == wanted
    assert [alone(model, row, **settings) for row in rows] == wanted


def test_what_is_refused():
    model = tiny_backbone()
    with pytest.raises(ValueError, match="`use_cache`"):
        ContinuousBatch(model, use_cache=False)
    with pytest.raises(ValueError, match="`use_cuda_graphs=True` cannot be had: rows come and go"):
        ContinuousBatch(model, use_cuda_graphs=True)
    for setting in ({"max_time": 1.0}, {"stop_strings": "end"}):
        with pytest.raises(ValueError, match=f"`{next(iter(setting))}` cannot be had: who reads"):
            ContinuousBatch(model, **setting)
    with pytest.raises(ValueError, match="`output_trajectory=True` cannot be had"):
        ContinuousBatch(model, output_trajectory=True, return_dict_in_generate=True)
    with pytest.raises(TypeError, match="`ContinuousBatch` takes no `guidance_scale`: only image codes"):
        ContinuousBatch(model, guidance_scale=2.0)
    training = tiny_backbone().train()
    training.activation_checkpointing_enable()
    with pytest.raises(ValueError, match="`use_cache`"):  # transformers drops caches then
        ContinuousBatch(training)
    with pytest.raises(TypeError, match="goes by `max_new_tokens`: it takes no `max_length`"):
        ContinuousBatch(model, max_length=9)
    batch = ContinuousBatch(model)
    with pytest.raises(ValueError, match="`max_new_tokens`"):
        batch.add(torch.tensor([1]), max_new_tokens=0)
    with pytest.raises(ValueError, match="`input_ids`.*mask"):
        batch.add(torch.tensor([1, 63]), max_new_tokens=4)
    with pytest.raises(ValueError, match="max_position_embeddings"):
        batch.add(torch.tensor([1]), max_new_tokens=512)
    with pytest.raises(TypeError, match="`max_new_tokens` must be an integer"):
        batch.add(torch.tensor([1]), max_new_tokens=1.5)
    for ids, error in (([1], TypeError), (torch.tensor([[1]]), ValueError)):
        with pytest.raises(error, match="`input_ids` must be a"):
            batch.add(ids, max_new_tokens=4)
    with pytest.raises(TypeError, match="`generator` must be a torch.Generator"):
        batch.add(torch.tensor([1]), max_new_tokens=4, generator=0)
    assert not batch.rows and batch.step() == []
