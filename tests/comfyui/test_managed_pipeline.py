import pytest

from comfyui.managed_pipeline import ManagedPipeline

from .test_nodes_codes import decode, draw


LANGUAGE_MODEL = "LLaDAUniForConditionalGeneration"
DECODER = ["AutoencoderKL", "LLaDAUniSemanticEmbedder", "ZImageTransformer2DModel"]


def test_only_what_a_node_needs_is_on_the_card(host, model):
    codes, _ = draw(model)
    assert host.card.classes() == [LANGUAGE_MODEL]
    decode(model, codes)
    assert host.card.classes() == sorted([LANGUAGE_MODEL, *DECODER])  # one of two decoders


def test_the_halves_take_turns_on_a_small_card(host, model, monkeypatch):
    released = []
    patcher = model._patchers["model"]
    monkeypatch.setattr(patcher, "release", lambda: released.append(patcher.is_on_card))
    host.card.size = 45e6  # the language model has 38 MB, a decoder with what goes with it 21
    codes, _ = draw(model)
    assert not released
    images = decode(model, codes)
    assert host.card.classes() == DECODER
    assert released == [True]  # what it had recorded goes before its weights do
    again, _ = draw(model)
    assert host.card.classes()[-1:] != DECODER[-1:] and (again[0] == codes[0]).all()
    assert (decode(model, codes)[0] == images[0]).all()


def test_memory_that_computing_takes_is_asked_for(host, model):
    codes, _ = draw(model, batch_size=2)
    decode(model, codes)
    writing, decoding = host.card.required
    assert writing == 2 * 16 * 256 * 1024
    assert decoding == 2 * 64 * 64 * 2800


def test_recorded_steps_are_released(model):
    assert model._patchers["model"].release == model.pipe.model.release_cuda_graphs
    assert all(patcher.release is None for name, patcher in model._patchers.items() if name != "model")


def test_the_pipeline_itself_stays_as_it_was(host, model):
    pipe = model.pipe
    draw(model)
    assert vars(pipe.model).keys().isdisjoint({"generate", "generate_image_codes"})
    assert all(getattr(pipe, name) is component for name, component in pipe.components.items())


def test_what_is_not_loaded_is_named(host, model):
    pipe = type(model.pipe)(**{**model.pipe.components, "model": None, "transformer": None, "transformer_turbo": None})
    without = ManagedPipeline(pipe)
    with pytest.raises(ValueError, match="component `model`, which is not loaded"):
        draw(without)
    with pytest.raises(ValueError, match="[Nn]o decoder is loaded"):
        decode(without, draw(model)[0])
