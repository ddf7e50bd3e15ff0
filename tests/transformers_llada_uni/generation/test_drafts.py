"""What a streamer of drafts is shown: the block under work after each of its steps."""

import pytest
import torch
from transformers import AutoTokenizer, TextDiffusionStreamer

from tests.transformers_llada_uni.generation.property_cases import tiny_backbone
from tests.transformers_llada_uni.generation.recorded_steps import recorded_on_cpu
from transformers_llada_uni import LLaDA2MoeForBlockDiffusion


class Recorder:
    def __init__(self):
        self.events = []

    def put(self, value):
        self.events.append(("put", value))

    def put_draft(self, value):
        self.events.append(("draft", value))

    def end(self):
        self.events.append(("end", None))


@pytest.mark.parametrize("settings", [{}, {"use_cuda_graphs": True}, {"cache_implementation": "sprint"}])
def test_masks_give_way_to_the_tokens_that_are_put(settings):
    model, recorder = tiny_backbone(), Recorder()
    model.set_experts_implementation("batched_mm")  # which can be recorded
    ids = torch.randint(0, 60, (1, 13), generator=torch.Generator().manual_seed(1))
    settings = {
        "max_new_tokens": 20,
        "block_length": 8,
        "num_steps_per_block": 3,
        "threshold": 1.0,
        "eos_token_id": None,
    } | settings
    with recorded_on_cpu():
        sequence = model.generate(ids, streamer=recorder, **settings)
        assert torch.equal(sequence, model.generate(ids, **settings))
    assert [kind for kind, _ in recorder.events[-2:]] == ["put", "end"]
    drafts, counts = [], []  # of each block
    for kind, value in recorder.events[1:-1]:
        if kind == "draft":
            drafts.append(value)
            continue
        assert all(draft.shape == (1, len(value)) for draft in drafts)
        assert all(bool(((draft[0] == value) | (draft[0] == 63)).all()) for draft in drafts)
        counts.append([int((draft == 63).sum()) for draft in drafts])
        drafts = []
    assert [count[-1] for count in counts] == [0] * 4
    # Steps fill in 3, 3 and 2 tokens. Of the first block's 5 are the prompt's, of the last one's 7 nobody's.
    assert settings.get("cache_implementation") or counts[:3] == [[0], [5, 2, 0], [5, 2, 0]]
    assert len(counts[2]) > 1


def test_streamer_of_transformers(official_tiny, capsys):
    tokenizer = AutoTokenizer.from_pretrained(official_tiny)
    model = LLaDA2MoeForBlockDiffusion.from_pretrained(official_tiny)
    ids = tokenizer("a dog", return_tensors="pt").input_ids
    settings = {"max_new_tokens": 12, "block_length": 4, "num_steps_per_block": 2, "mask_token_id": 441}
    streamer = TextDiffusionStreamer(tokenizer, skip_prompt=True)
    sequence = model.generate(ids, eos_token_id=None, streamer=streamer, **settings)
    printed = capsys.readouterr().out
    assert printed.count("\033[33m") >= 6  # its drafts are yellow
    assert printed.count("<|mask|>") > 0
    # What a terminal shows in the end: drafts are wiped out.
    shown = "".join(piece.split("\0338\033[J")[-1] for piece in printed.split("\0337"))
    assert shown.strip() == tokenizer.decode(sequence[0, ids.shape[1] :]).strip()
