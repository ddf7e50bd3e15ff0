"""What ends a row besides an end token: stop strings, criteria, time; and temperature 0, which ends chance."""

from contextlib import nullcontext

import pytest
import torch
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
)

from tests.transformers_llada_uni.generation.property_cases import tiny_backbone
from tests.transformers_llada_uni.generation.recorded_steps import recorded_on_cpu
from transformers_llada_uni import LLaDA2MoeForBlockDiffusion


SETTINGS = {"max_new_tokens": 40, "block_length": 8, "num_steps_per_block": 2, "eos_token_id": None}


@pytest.fixture(scope="module")
def model():
    return tiny_backbone()


@pytest.fixture(scope="module")
def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Two of unequal length, padded with what no prompt holds."""
    ids = torch.randint(0, 60, (2, 21), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    ids[1, :6], mask[1, :6] = 62, 0
    return ids, mask


class StopsAfter(StoppingCriteria):
    """Says so of a row whose last tokens are these; remembers what it was shown."""

    def __init__(self, *endings: list[int]) -> None:
        self.endings, self.shown = endings, []

    def __call__(self, input_ids, scores, **kwargs):
        assert scores is None
        self.shown.append(input_ids)
        is_done = any(input_ids[0, -len(ending) :].tolist() == ending for ending in self.endings)
        return torch.tensor([is_done], device=input_ids.device)


class TestCriteria:
    @pytest.mark.parametrize("is_recorded", [False, True])
    def test_rows_are_cut_with_the_token_that_stops_them(self, model, prompts, is_recorded):
        ids, mask = prompts
        free = model.generate(ids, mask, **SETTINGS)
        endings = [free[0, 21 + 10 : 21 + 12].tolist(), free[1, 21 + 29 : 21 + 31].tolist()]
        lengths = [next(n for n in range(1, 41) if row[: 21 + n][-2:].tolist() in endings) for row in free]
        assert lengths[0] <= 12 and lengths[1] <= 31 and lengths[0] != lengths[1]
        with recorded_on_cpu() if is_recorded else nullcontext():
            found = model.generate(ids, mask, stopping_criteria=[StopsAfter(*endings)], **SETTINGS)
        assert found.shape == (2, 21 + max(lengths))
        for row, length in enumerate(lengths):
            assert torch.equal(found[row, : 21 + length], free[row, : 21 + length])
            assert set(found[row, 21 + length :].tolist()) <= {62}

    def test_they_see_the_prompt_as_given_and_one_more_token_at_a_time(self, model, prompts):
        ids, mask = prompts
        criterion = StopsAfter()
        found = model.generate(ids[1:], mask[1:], stopping_criteria=StoppingCriteriaList([criterion]), **SETTINGS)
        assert [shown.shape for shown in criterion.shown] == [(1, 21 + length) for length in range(1, 41)]
        assert torch.equal(criterion.shown[-1], found)
        assert all(torch.equal(shown, found[:, : shown.shape[1]]) for shown in criterion.shown)

    def test_an_end_token_before_them_counts(self, model, prompts):
        free = model.generate(prompts[0][:1], **SETTINGS)
        late = StopsAfter(free[0, 21 + 20 : 21 + 23].tolist())
        settings = SETTINGS | {"eos_token_id": int(free[0, 21 + 2])}
        found = model.generate(prompts[0][:1], stopping_criteria=[late], **settings)
        assert torch.equal(found, model.generate(prompts[0][:1], **settings)) and found.shape[1] <= 24

    def test_streams_end_where_rows_do(self, model, prompts):
        class Streamer:
            def __init__(self):
                self.tokens = []

            def put(self, value):
                self.tokens += value.flatten().tolist()

            def end(self):
                self.tokens.append("end")

        free = model.generate(prompts[0][:1], **SETTINGS)
        streamer, criterion = Streamer(), StopsAfter(free[0, 21 + 10 : 21 + 13].tolist())
        found = model.generate(prompts[0][:1], streamer=streamer, stopping_criteria=[criterion], **SETTINGS)
        assert streamer.tokens == [*found[0].tolist(), "end"]
        assert found.shape[1] < free.shape[1]


class TestTime:
    @pytest.mark.parametrize("way", ["max_time", "criterion"])
    def test_the_block_under_work_is_kept_whole(self, model, prompts, way):
        arguments = {"max_time": 1e-9} if way == "max_time" else {"stopping_criteria": [MaxTimeCriteria(1e-9)]}
        free = model.generate(*prompts, **SETTINGS)
        found = model.generate(*prompts, **arguments, **SETTINGS)
        # 21 tokens end in the third block, 15 in the second: their blocks end 3 and 1 tokens later.
        assert torch.equal(found[0, 21:], free[0, 21:24])
        assert found[1, 21:].tolist() == [int(free[1, 21]), 62, 62]

    def test_gaps_of_the_prompt_are_filled_in_all_the_same(self, model, prompts):
        ids = prompts[0][:1].clone()
        ids[0, [2, 11]] = 63
        found = model.generate(ids, max_time=1e-9, **SETTINGS)
        assert found.shape[1] == 24 and bool((found != 63).all())

    def test_enough_of_it_changes_nothing(self, model, prompts):
        assert torch.equal(model.generate(*prompts, max_time=60, **SETTINGS), model.generate(*prompts, **SETTINGS))


class TestStopStrings:
    @pytest.fixture(scope="class")
    def released(self, official_tiny):
        return LLaDA2MoeForBlockDiffusion.from_pretrained(official_tiny)

    @pytest.fixture(scope="class")
    def tokenizer(self, official_tiny):
        return AutoTokenizer.from_pretrained(official_tiny)

    @pytest.mark.parametrize("way", ["call", "config", "config of transformers"])
    def test_the_text_ends_with_the_token_that_completes_one(self, released, tokenizer, way):
        ids = tokenizer("a dog", return_tensors="pt").input_ids
        length = ids.shape[1]
        settings = {"max_new_tokens": 32, "block_length": 8, "mask_token_id": 441, "eos_token_id": None}
        free = released.generate(ids, **settings)[0]
        pieces = [tokenizer.decode(token) for token in free[length:]]
        # The end of one token and the begin of the next, of which more may follow.
        at = next(n for n in range(8, 31) if len(pieces[n]) > 1 and len(pieces[n + 1]) > 1 and pieces[n].isascii())
        stop = pieces[at][-1] + pieces[at + 1][:1]
        wanted = next(n for n in range(1, 33) if stop in tokenizer.decode(free[length : length + n]))
        if way == "call":
            settings["stop_strings"] = stop
        elif way == "config":
            settings["generation_config"] = type(released.generation_config)(stop_strings=[stop, "never"])
        else:
            settings["generation_config"] = GenerationConfig(stop_strings=[stop, "never"])
        found = released.generate(ids, tokenizer=tokenizer, **settings)[0]
        assert torch.equal(found, free[: length + wanted])


class TestTemperatureOfZero:
    def test_is_greedy(self, model, prompts):
        greedy = model.generate(*prompts, **SETTINGS)
        for settings in ({}, {"do_sample": True}, {"do_sample": True, "top_k": 3}):
            assert torch.equal(model.generate(*prompts, temperature=0, **settings, **SETTINGS), greedy)
        assert not torch.equal(model.generate(*prompts, temperature=5.0, do_sample=True, **SETTINGS), greedy)

    def test_has_one_answer(self, model, prompts):
        with pytest.raises(ValueError, match="`num_return_sequences` is 2, .* `temperature` of 0"):
            model.generate(prompts[0], temperature=0.0, do_sample=True, num_return_sequences=2)
