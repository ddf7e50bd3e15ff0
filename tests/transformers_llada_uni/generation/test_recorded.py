"""Recorded steps, on a CPU: traced to operators once and replayed, see `tests/recorded_steps.py`."""

import copy
import gc
import threading
import weakref

import peft
import pytest
import torch
from torch import nn

from tests.transformers_llada_uni.generation.property_cases import tiny_backbone
from tests.transformers_llada_uni.generation.recorded_steps import TracedProgram, recorded_on_cpu
from transformers_llada_uni.generation import decoding, recording
from transformers_llada_uni.generation.recording import recordings_of, why_not_recorded, why_not_static


@pytest.fixture(scope="module")
def model():
    model = tiny_backbone()
    model.set_experts_implementation("batched_mm")  # in float64, as grouped_mm is not
    return model


@pytest.fixture(autouse=True)
def nothing_is_kept(model):
    yield
    model.release_cuda_graphs()


def ids_of(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 60, shape, generator=torch.Generator().manual_seed(seed))


SETTINGS = {"block_length": 8, "num_steps_per_block": 3}
TEXT = SETTINGS | {"input_ids": ids_of(1, 21), "max_new_tokens": 30, "eos_token_id": []}
CODES = SETTINGS | {"input_ids": ids_of(1, 21), "grid": (4, 6), "negative_input_ids": ids_of(1, 9, seed=1)}
PADDING = torch.ones(2, 21, dtype=torch.long)
PADDING[1, :6] = 0
GAPS = ids_of(1, 30)
GAPS[0, [3, 4, 20]] = 63


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in (3, 4)]


# Of each kind of call the method and its arguments; those that are functions are made anew for each call.
KINDS = {
    "text of a schedule": ("generate", TEXT | {"threshold": 1.0}),
    "text that may end early, in a padded batch whose rows end apart": (
        "generate",
        TEXT | {"input_ids": ids_of(2, 21), "attention_mask": PADDING, "threshold": 0.1, "eos_token_id": [1, 2, 3]},
    ),
    "text with token editing": ("generate", TEXT | {"editing_threshold": 0.02, "max_post_steps": 3}),
    "gaps in a prompt": ("generate", TEXT | {"input_ids": GAPS, "max_new_tokens": 10}),
    "sampled text, a generator for each row": (
        "generate",
        TEXT | {"input_ids": ids_of(2, 21), "do_sample": True, "top_k": 20, "top_p": 0.9, "generator": generators},
    ),
    "text whose choice goes by what earlier steps predicted": ("generate", TEXT | {"credit_alpha": 2.0}),
    "text with re-masking": ("generate", TEXT | {"threshold": 0.3, "remasking_threshold": 0.7}),
    "codes": ("generate_image_codes", {name: CODES[name] for name in ("input_ids", "grid", *SETTINGS)}),
    "guided codes": ("generate_image_codes", CODES),
    "guided codes with re-masking": ("generate_image_codes", CODES | {"remasking_threshold": 0.5}),
    "guided codes, the first half of them without guidance": (
        "generate_image_codes",
        CODES | {"guidance_ramp": (0.5, 0.5)},
    ),
    "codes guided by text and image": (
        "generate_image_codes",
        CODES | {"negative_image_input_ids": ids_of(1, 30, seed=2), "image_guidance_scale": 1.5},
    ),
}


def call(model, kind: str, **settings) -> torch.Tensor:
    method, arguments = KINDS[kind]
    arguments = {name: value() if callable(value) else value for name, value in arguments.items()}
    arguments = {
        name: value.to(model.device) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()
    }
    return getattr(model, method)(**arguments, **settings)


@pytest.mark.parametrize("kind", KINDS)
def test_recorded_steps_give_the_same_tokens(model, kind):
    wanted = call(model, kind)
    count = TracedProgram.count
    with recorded_on_cpu():
        assert torch.equal(call(model, kind, use_cuda_graphs=True), wanted)
        assert torch.equal(call(model, kind), wanted)  # by default
        num_graphs = TracedProgram.count - count
        assert torch.equal(call(model, kind), wanted)
        assert TracedProgram.count - count == num_graphs
    # A step, a step that takes a finished block along, and what takes in the prompt; with and without guidance
    assert 1 <= num_graphs <= (6 if "guidance_ramp" in KINDS[kind][1] else 3)


def test_a_call_makes_no_state_where_it_finds_one(model, monkeypatch):
    made = []
    make = decoding.BlockState
    monkeypatch.setattr(decoding, "BlockState", lambda *args, **named: made.append(args) or make(*args, **named))
    with recorded_on_cpu():
        for _ in range(3):
            call(model, "guided codes")
    assert len(made) == 1


def test_other_lengths_are_served_by_the_same_graphs(model):
    lengths = ((21, 30), (3, 50), (34, 40), (60, 20))
    cases = [
        TEXT | {"input_ids": ids_of(1, length), "max_new_tokens": num_new_tokens, "threshold": 1.0}
        for length, num_new_tokens in lengths
    ]
    wanted, count = [model.generate(**case) for case in cases], TracedProgram.count
    with recorded_on_cpu():
        for case, tokens in zip(cases, wanted, strict=True):
            assert torch.equal(model.generate(**case), tokens)
    # Those of steps, and of the two lengths of pieces in which a prompt is taken in.
    assert TracedProgram.count - count <= 4


def test_moved_weights_are_recorded_anew(model):
    kind = "text of a schedule"
    model = tiny_backbone()
    model.set_experts_implementation("batched_mm")
    with recorded_on_cpu():
        call(model, kind)
        before = recordings_of(model.model)._kept
        [buffers] = before.values()
        dense = model.model.layers[0].attention.dense
        dense.weight = nn.Parameter(dense.weight.detach().roll(1, dims=0))
        found = call(model, kind)
        [others] = recordings_of(model.model)._kept.values()
        assert others is not buffers
        dense.weight.data.mul_(2.0)  # in its place: the graph reads what is there
        changed = call(model, kind)
        assert [others] == list(recordings_of(model.model)._kept.values())
    assert torch.equal(changed, call(model, kind))
    dense.weight.data.div_(2.0)
    assert torch.equal(found, call(model, kind))


def test_kinds_and_bytes_are_bounded_and_released(model, monkeypatch):
    monkeypatch.setattr(recording, "MAX_KINDS", 3)
    recordings = recordings_of(model.model)
    with recorded_on_cpu():
        for threshold in (1.0, 0.9, 0.8, 0.7):
            model.generate(**TEXT | {"max_new_tokens": 8}, threshold=threshold)
        assert len(recordings._kept) == 3
        one_kind = recordings.num_bytes // 3
        monkeypatch.setattr(recording, "MAX_BYTES", 2 * one_kind)
        model.generate(**TEXT | {"max_new_tokens": 8}, threshold=0.6)
        assert recordings.num_bytes == 2 * one_kind
        model.release_cuda_graphs()
        assert recordings.num_bytes == 0


def test_recordings_do_not_keep_the_model():
    model = tiny_backbone()
    model.set_experts_implementation("batched_mm")
    with recorded_on_cpu():
        call(model, "guided codes")
    assert recordings_of(model.model).num_bytes
    copied = copy.deepcopy(model)  # recordings stay behind
    assert not recordings_of(copied.model).num_bytes
    reference = weakref.ref(model.model)
    gc.collect()
    gc.disable()
    try:
        del model
        assert reference() is None
    finally:
        gc.enable()


def test_threads_get_their_own_tokens(model):
    cases = [TEXT | {"input_ids": ids_of(1, 21, seed=seed), "threshold": 1.0} for seed in range(6)]
    wanted = [model.generate(**case) for case in cases]
    found = [None] * len(cases)

    def work(index: int) -> None:
        found[index] = model.generate(**cases[index])

    with recorded_on_cpu():
        model.generate(**cases[0])
        threads = [threading.Thread(target=work, args=(index,)) for index in range(len(cases))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for tokens, others in zip(wanted, found, strict=True):
        assert torch.equal(tokens, others)


def test_a_thread_that_waits_in_vain_goes_on_alone(model, monkeypatch):
    """A callback that waits for another thread, which waits for the call that the callback belongs to."""
    monkeypatch.setattr(recording, "LONGEST_WAIT", 0.2)
    wanted, found = model.generate(**TEXT), []

    def callback(*_):
        thread = threading.Thread(target=lambda: found.append(model.generate(**TEXT)))
        thread.start()
        thread.join()
        model.release_cuda_graphs()  # waits for nobody either

    with recorded_on_cpu():
        model.generate_image_codes(**CODES, callback=callback)
    assert found and all(torch.equal(tokens, wanted) for tokens in found)


def test_nothing_of_a_broken_call_is_left(model):
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    wanted = call(model, "text of a schedule")
    weight = model.model.layers[0].attention.query_key_value.weight
    kept = weight.detach().clone()
    with recorded_on_cpu():
        weight.data.fill_(torch.nan)
        call(model, "text of a schedule")
        weight.data.copy_(kept)
        assert torch.equal(call(model, "text of a schedule"), wanted)
        model.config.routed_scaling_factor *= 2
        changed = call(model, "text of a schedule")
    assert torch.equal(changed, call(model, "text of a schedule"))
    assert not torch.equal(changed, wanted)


def test_what_is_kept_goes_when_the_model_goes_elsewhere(model):
    with recorded_on_cpu():
        call(model, "guided codes")
        assert recordings_of(model.model).num_bytes
    call(model, "guided codes")  # on a CPU again
    assert not recordings_of(model.model).num_bytes


def test_one_generator_gives_a_row_the_same_numbers_by_every_way(model):
    """Rows end apart; those that go on must not notice."""
    arguments = TEXT | {"input_ids": ids_of(3, 21), "do_sample": True, "eos_token_id": [1, 2, 3, 4], "threshold": 0.5}

    def sampled(**settings) -> torch.Tensor:
        return model.generate(**arguments, generator=torch.Generator().manual_seed(0), **settings)

    wanted = sampled()
    assert torch.equal(sampled(use_cache=False), wanted)
    with recorded_on_cpu():
        assert torch.equal(sampled(), wanted)


def test_uniforms_are_float32_whatever_the_default(model):
    arguments = TEXT | {"do_sample": True, "threshold": 1.0}
    wanted = model.generate(**arguments, generator=torch.Generator().manual_seed(0))
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = model.generate(**arguments, generator=torch.Generator().manual_seed(0))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, wanted)


def test_a_callback_may_generate(model):
    wanted = model.generate_image_codes(**CODES)
    inner = []
    with recorded_on_cpu():
        found = model.generate_image_codes(**CODES, callback=lambda *_: inner.append(model.generate(**TEXT)))
    assert torch.equal(found, wanted)
    assert torch.equal(inner[-1], model.generate(**TEXT))


def test_buffers_made_in_inference_mode_serve_outside_of_it(model):
    wanted = model.generate(**TEXT)
    with recorded_on_cpu():
        with torch.inference_mode():
            assert torch.equal(model.generate(**TEXT), wanted)
        assert torch.equal(model.generate(**TEXT), wanted)


def test_a_program_that_cannot_be_recorded_goes_on_as_it_is(model, monkeypatch):
    tries = []

    def refuse(program, pool):
        tries.append(program)
        raise RuntimeError("operation not permitted when stream is capturing")

    wanted = model.generate(**TEXT)
    with recorded_on_cpu():
        monkeypatch.setattr(recording, "CudaGraph", refuse)
        assert torch.equal(model.generate(**TEXT), wanted)
        assert torch.equal(
            model.generate(**TEXT, threshold=0.5), model.generate(**TEXT, threshold=0.5, use_cache=False)
        )
    # Of each kind once, and not at every step: a step, and a step behind a finished block.
    assert len(tries) == 4


def test_an_interrupted_recording_is_made_again(model, monkeypatch):
    def interrupt(program, pool):
        raise KeyboardInterrupt

    wanted, count = model.generate(**TEXT), TracedProgram.count
    with recorded_on_cpu():
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(recording, "CudaGraph", interrupt)
            model.generate(**TEXT)
        assert torch.equal(model.generate(**TEXT), wanted)
    assert TracedProgram.count > count


class TestWhyNot:
    @pytest.fixture
    def other(self):
        model = tiny_backbone().float()
        model.set_experts_implementation("grouped_mm")
        return model

    def test_a_cpu(self, other):
        assert "not on a GPU" in why_not_static(other.model, other.lm_head)
        with pytest.raises(ValueError, match="`use_cuda_graphs=True` cannot be had: the model is on cpu"):
            other.generate(**TEXT, use_cuda_graphs=True)

    def test_reasons(self, other):
        with recorded_on_cpu():
            assert why_not_static(other.model, other.lm_head) is None
            other.model(ids_of(1, 8), output_hidden_states=True)  # leaves transformers' own hooks behind
            assert why_not_static(other.model, other.lm_head) is None
            assert why_not_recorded(other.model, other.lm_head) is None
            handle = other.model.layers[0].register_forward_hook(lambda *_: None)
            assert "hooks" in why_not_static(other.model, other.lm_head)
            handle.remove()
            other.set_experts_implementation("eager")
            assert "'eager'" in why_not_recorded(other.model, other.lm_head)
            assert why_not_static(other.model, other.lm_head) is None
            other.set_experts_implementation("grouped_mm")
            with torch.autocast("cpu", torch.bfloat16):
                assert "autocast" in why_not_static(other.model, other.lm_head)
            other.model.layers[0].compile()
            assert "compiled" in why_not_static(other.model, other.lm_head)
            other.model.layers[0]._compiled_call_impl = None
            other.train()
            assert "training" in why_not_recorded(other.model, other.lm_head)
            other.eval()
            adapted = peft.get_peft_model(other, peft.LoraConfig(target_modules=["dense"]))
            assert "adapters" in why_not_recorded(other.model, other.lm_head)
            wanted = adapted.generate(**TEXT)
        assert torch.equal(adapted.generate(**TEXT), wanted)
