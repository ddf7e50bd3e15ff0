import copy
import json
import os
import subprocess
import sys
import typing
from functools import partial

import accelerate
import diffusers.schedulers.scheduling_flow_match_euler_discrete as scheduling
import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    ZImageTransformer2DModel,
)
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.group_offloading import ModuleGroup
from safetensors.torch import load_file
from transformers import TextStreamer

from diffusers_llada_uni import (
    LLaDAUniPipeline,
    LLaDAUniPipelineOutput,
    LLaDAUniSemanticEmbedder,
    code_decoding,
    code_generation,
)
from diffusers_llada_uni.code_decoding import CodeDecoder, decoder_sigmas, decoder_velocity, guided_velocity
from diffusers_llada_uni.code_generation import CodeGenerationSettings, CodeGenerator, check_generation_kwargs
from diffusers_llada_uni.decoders import DECODERS
from diffusers_llada_uni.image_inputs import touched_codes
from transformers_llada_uni.generation import configuration as generation_configuration


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def quiet(pipe: DiffusionPipeline) -> DiffusionPipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe


# The half from codes to pixels, with components made from the released files.


@pytest.fixture(scope="module")
def expected(official_tiny):
    return load_file(official_tiny / "expected" / "decoder.safetensors")


@pytest.fixture(scope="module")
def codes(expected):
    return expected["token_ids"].view(1, *expected["grid"].tolist())


@pytest.fixture(scope="module")
def decoding_components(official_tiny):
    def transformer(folder):
        config = json.loads((official_tiny / folder / "config.json").read_text())
        model = ZImageTransformer2DModel.from_config({**config, "axes_lens": [32768, 1024, 1024]})
        weights = load_file(official_tiny / folder / "model.safetensors")
        model.load_state_dict({name.replace("semantic_embedder.", "cap_embedder."): w for name, w in weights.items()})
        return model.eval()

    embedder = LLaDAUniSemanticEmbedder(codebook_size=256, embedding_dim=64)
    embedder.load_state_dict(torch.load(official_tiny / "image_tokenizer" / "sigvq_embedding.pt", weights_only=True))
    return {
        "model": None,
        "processor": None,
        "semantic_embedder": embedder,
        "vae": AutoencoderKL.from_pretrained(official_tiny / "vae"),
        "transformer": transformer("decoder"),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=6.0),
        "transformer_turbo": transformer("decoder-turbo"),
        "scheduler_turbo": FlowMatchEulerDiscreteScheduler(shift=1.0, stochastic_sampling=True),
    }


@pytest.fixture
def decoding(decoding_components):
    return quiet(LLaDAUniPipeline(**decoding_components))


@pytest.mark.parametrize("time", ["0.0", "0.37", "0.9"])
def test_released_velocities(decoding, expected, codes, time):
    with torch.no_grad():
        velocity = decoder_velocity(
            decoding.transformer,
            expected["initial_noise"],
            torch.tensor(float(time)),
            decoding.semantic_embedder(codes).sample,
            guidance_scale=0.0,
        )
    torch.testing.assert_close(velocity[0], expected[f"velocity.decoder.t{time}"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("output_type, name", [("latent", "latents"), ("pt", "pixels")])
def test_released_normal_decoder(decoding, expected, codes, output_type, name):
    decoded = decoding.decode_codes(
        codes, decoder="normal", num_inference_steps=7, latents=expected["initial_noise"], output_type=output_type
    )
    torch.testing.assert_close(decoded, expected[f"normal.{name}"], atol=1e-3, rtol=0)


@pytest.mark.parametrize("output_type, name", [("latent", "latents"), ("pt", "pixels")])
def test_released_turbo_decoder(decoding, expected, codes, output_type, name, monkeypatch):
    noises = iter(expected["turbo.step_noises"])
    monkeypatch.setattr(scheduling, "randn_tensor", lambda *args, **kwargs: next(noises))
    decoded = decoding.decode_codes(
        codes, num_inference_steps=4, latents=expected["initial_noise"], output_type=output_type
    )
    torch.testing.assert_close(decoded, expected[f"turbo.{name}"], atol=1e-3, rtol=0)
    assert next(noises, None) is None


def test_sigmas():
    assert decoder_sigmas("turbo", 4) == [1.0, 0.75, 0.5, 0.25]
    assert decoder_sigmas("normal", 5) == [1.0, 0.75, 0.5, 0.25]


def test_guidance_never_makes_velocities_longer():
    with_features, without = torch.randn(2, 2, 3, 4, 4, generator=seeded(0))
    without[1] = 0.9 * with_features[1]  # the second grows by guidance, towards 1.1 times its length
    guided = guided_velocity(with_features, without, 1.0)
    lengths, limits = guided.flatten(1).norm(dim=1), with_features.flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths[1], limits[1])
    torch.testing.assert_close(guided[1], with_features[1])
    assert lengths[0] <= limits[0] * (1 + 1e-6)
    shorter = guided_velocity(with_features, 1.5 * with_features, 1.0)
    torch.testing.assert_close(shorter, 0.5 * with_features)  # shorter than the limit: left as it is


@pytest.mark.parametrize("upscale, side", [(1, 16), (2, 32), (3, 48), (4, 64)])
def test_output_types_and_upscale(decoding, upscale, side):
    codes = torch.arange(12).view(2, 2, 3)
    arguments = {"upscale": upscale, "num_inference_steps": 2}
    size = (2 * side, 3 * side)
    images = decoding.decode_codes(codes, **arguments, generator=seeded(0))
    assert [image.size for image in images] == [size[::-1]] * 2
    array = decoding.decode_codes(codes, **arguments, generator=seeded(0), output_type="np")
    assert array.shape == (2, *size, 3) and array.min() >= 0 and array.max() <= 1
    tensor = decoding.decode_codes(codes, **arguments, generator=seeded(0), output_type="pt")
    np.testing.assert_allclose(tensor.permute(0, 2, 3, 1).numpy(), array)
    np.testing.assert_allclose(np.asarray(images[1]), array[1] * 255, atol=0.51)
    latents = decoding.decode_codes(codes, **arguments, generator=seeded(0), output_type="latent")
    assert latents.shape == (2, 16, size[0] // 8, size[1] // 8) and latents.dtype == torch.float32


@pytest.mark.parametrize("decoder", ["turbo", "normal"])
def test_batch_equals_single(decoding, decoder):
    codes = torch.arange(18).view(3, 2, 3)
    arguments = {"decoder": decoder, "num_inference_steps": 3, "output_type": "latent"}
    batch = decoding.decode_codes(codes, generator=[seeded(i) for i in range(3)], **arguments)
    for i in range(3):
        single = decoding.decode_codes(codes[i : i + 1], generator=seeded(i), **arguments)
        torch.testing.assert_close(batch[i : i + 1], single, atol=1e-4, rtol=0)
    assert not torch.allclose(batch[0], batch[1], atol=1e-2)


def test_generator_decides(decoding, codes):
    def run(seed):
        return decoding.decode_codes(codes, generator=seeded(seed), num_inference_steps=2, output_type="latent")

    assert torch.equal(run(1), run(1))
    assert not torch.allclose(run(1), run(2), atol=1e-2)


def test_decoder_defaults(decoding, codes, monkeypatch):
    passes = {"turbo": [], "normal": []}
    for name, model in (("turbo", decoding.transformer_turbo), ("normal", decoding.transformer)):
        forward = model.forward

        def counted(x, *args, name=name, forward=forward, **kwargs):
            passes[name].append(len(x))
            return forward(x, *args, **kwargs)

        monkeypatch.setattr(model, "forward", counted)
    decoding.decode_codes(codes, output_type="latent")
    assert passes == {"turbo": [1] * 8, "normal": []} and decoding.num_timesteps == 8
    decoding.decode_codes(codes, decoder="normal", output_type="latent")
    assert passes["normal"] == [2] * 49 and len(passes["turbo"]) == 8  # guidance takes a second row
    passes["normal"].clear()
    arguments = {"decoder": "normal", "num_inference_steps": 3, "output_type": "latent", "generator": seeded(0)}
    decoding.decode_codes(codes, decoder_guidance_scale=0.0, **arguments)
    assert passes["normal"] == [1, 1]


def test_only_the_normal_decoder(decoding_components, codes):
    absent = {"transformer_turbo": None, "scheduler_turbo": None}
    pipe = quiet(LLaDAUniPipeline(**{**decoding_components, **absent}))
    assert pipe.loaded_decoders == ["normal"]
    assert len(pipe.decode_codes(codes, num_inference_steps=3)) == 1
    assert pipe.num_timesteps == 2


def test_callback_sees_and_changes_tensors(decoding, codes):
    seen = []

    def callback(pipe, step, timestep, tensors):
        assert pipe is decoding and set(tensors) == {"latents", "image_features"}
        seen.append((step, float(timestep)))
        return {"latents": torch.zeros_like(tensors["latents"])}

    latents = decoding.decode_codes(
        codes,
        num_inference_steps=4,
        output_type="latent",
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["latents", "image_features"],
    )
    assert seen == [(0, 1000.0), (1, 750.0), (2, 500.0), (3, 250.0)]
    assert not latents.any()


def count_calls(monkeypatch, module):
    calls, forward = [], module.forward

    def counted(*args, **kwargs):
        calls.append(args[0].shape[0])
        return forward(*args, **kwargs)

    monkeypatch.setattr(module, "forward", counted)
    return calls


def turn_off_condition_memory(monkeypatch):
    monkeypatch.setattr(
        "diffusers_llada_uni.stepped_decoder.with_remembered_condition", lambda transformer: transformer
    )


@pytest.mark.parametrize("decoder, rows", [("turbo", 2), ("normal", 4)])
@pytest.mark.parametrize("grid", [(2, 3), (2, 4)])  # 24 features, which are padded to 32; and 32
def test_condition_is_computed_once_per_decoding(decoding, monkeypatch, decoder, rows, grid):
    codes = torch.arange(2 * grid[0] * grid[1]).view(2, *grid)
    refined = count_calls(monkeypatch, getattr(decoding, DECODERS[decoder][0]).context_refiner[0])
    embedded = count_calls(monkeypatch, getattr(decoding, DECODERS[decoder][0]).cap_embedder)

    def run(codes):
        arguments = {"decoder": decoder, "num_inference_steps": 5, "output_type": "latent"}
        return decoding.decode_codes(codes, generator=seeded(0), **arguments)

    cached = [run(codes), run(codes + 1)]  # the second image has a condition of its own
    assert refined == [rows] * 2 and embedded == [rows * 32] * 2
    turn_off_condition_memory(monkeypatch)
    every_step = [run(codes), run(codes + 1)]
    assert len(refined) == 2 + 2 * decoding.num_timesteps
    for ours, theirs in zip(cached, every_step, strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.allclose(cached[0], cached[1], atol=1e-2)


@pytest.mark.parametrize("in_place", [True, False])
def test_features_changed_by_a_callback_are_seen(decoding, codes, monkeypatch, in_place):
    given, others = decoding.semantic_embedder(codes).sample, decoding.semantic_embedder(codes.flip(1)).sample

    def callback(pipe, step, timestep, tensors):
        if step == 1:
            if in_place:
                tensors["image_features"].copy_(others)
            return {} if in_place else {"image_features": others}

    latents = decoding.decode_codes(
        codes,
        "normal",
        num_inference_steps=5,
        generator=seeded(0),
        output_type="latent",
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["image_features"] if in_place else [],
    )

    velocity, times = decoder_velocity, []

    def velocity_of_step(transformer, latents, time, image_features, guidance_scale):
        times.append(time)
        return velocity(transformer, latents, time, given if len(times) <= 2 else others, guidance_scale)

    monkeypatch.setattr(code_decoding, "decoder_velocity", velocity_of_step)
    turn_off_condition_memory(monkeypatch)
    expected = decoding.decode_codes(codes, "normal", num_inference_steps=5, generator=seeded(0), output_type="latent")
    assert len(times) == 4 and torch.equal(latents, expected)


def test_decoder_is_left_as_it_was(decoding, codes, monkeypatch):
    features = decoding.semantic_embedder(codes).sample
    arguments = (torch.ones(1, 16, 8, 8), torch.tensor(0.5))
    before = decoder_velocity(decoding.transformer_turbo, *arguments, features, 0.0)

    def callback(pipe, step, timestep, tensors):  # uses the decoder with other features
        other = decoder_velocity(decoding.transformer_turbo, *arguments, 1 - features, 0.0)
        assert not torch.allclose(other, before, atol=1e-3)
        if step == 1:
            raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        decoding.decode_codes(codes, num_inference_steps=3, callback_on_step_end=callback)
    assert torch.equal(decoder_velocity(decoding.transformer_turbo, *arguments, features, 0.0), before)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="inside of a step"):

        def fail(*args):
            raise RuntimeError("inside of a step")

        patch.setattr(decoding.transformer_turbo, "unpatchify", fail)
        decoding.decode_codes(codes, num_inference_steps=3)
    assert torch.equal(decoder_velocity(decoding.transformer_turbo, *arguments, features, 0.0), before)


OTHERS_IN_THE_DECODER = {
    "group offloading": lambda decoder: decoder.enable_group_offload(
        torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
    ),
    "compiled decoder": lambda decoder: decoder.compile(backend="eager"),
    "another forward": lambda decoder: setattr(decoder, "forward", partial(decoder.forward)),
    "compiled block": lambda decoder: decoder.context_refiner[0].compile(backend="eager"),
}


@pytest.mark.parametrize("other", OTHERS_IN_THE_DECODER)
def test_condition_is_not_skipped_where_others_count_on_it(decoding, codes, monkeypatch, other):
    turbo = copy.deepcopy(decoding.transformer_turbo)
    decoding.register_modules(transformer_turbo=turbo)
    refined = count_calls(monkeypatch, turbo.context_refiner[0].feed_forward)

    def run():
        return decoding.decode_codes(codes, num_inference_steps=3, generator=seeded(0), output_type="latent")

    reference = run()
    assert len(refined) == 1
    OTHERS_IN_THE_DECODER[other](turbo)
    refined.clear()
    torch.testing.assert_close(run(), reference)
    assert len(refined) == (1 if other == "compiled block" else 3)


def test_guidance_changed_by_a_callback(decoding, codes, monkeypatch):
    """As diffusers' `SDCFGCutoffCallback` does it."""
    rows = count_calls(monkeypatch, decoding.transformer.t_embedder)
    scales = []

    def cut_off(pipe, step, timestep, tensors):
        scales.append((pipe.guidance_scale, pipe.do_classifier_free_guidance))
        if step in (1, 3):
            pipe._guidance_scale = 0.0 if step == 1 else 1.0

    arguments = {"decoder": "normal", "num_inference_steps": 7, "output_type": "latent"}
    latents = decoding.decode_codes(codes, generator=seeded(0), callback_on_step_end=cut_off, **arguments)
    assert rows == [2, 2, 1, 1, 2, 2] and scales == [(1.0, True)] * 2 + [(0.0, False)] * 2 + [(1.0, True)] * 2
    turn_off_condition_memory(monkeypatch)
    again = decoding.decode_codes(codes, generator=seeded(0), callback_on_step_end=cut_off, **arguments)
    assert torch.equal(latents, again)
    assert not torch.equal(latents, decoding.decode_codes(codes, generator=seeded(0), **arguments))


def test_interrupt(decoding, codes):
    steps = []

    def callback(pipe, step, timestep, tensors):
        steps.append(step)
        pipe._interrupt = step == 1

    decoding.decode_codes(codes, num_inference_steps=5, callback_on_step_end=callback)
    assert steps == [0, 1] and decoding.interrupt
    steps.clear()
    decoding.decode_codes(codes, num_inference_steps=2)
    assert not decoding.interrupt


def test_progress_bar(decoding, codes, capsys):
    decoding.set_progress_bar_config(disable=False)
    decoding.decode_codes(codes, num_inference_steps=3)
    assert "3/3" in capsys.readouterr().err
    quiet(decoding).decode_codes(codes, num_inference_steps=3)
    assert capsys.readouterr().err == ""


def test_vae_slicing_and_tiling(decoding, official_tiny):
    decoding.vae = AutoencoderKL.from_pretrained(official_tiny / "vae")
    codes = torch.arange(12).view(2, 2, 3)
    arguments = {"num_inference_steps": 2, "output_type": "pt"}
    whole = decoding.decode_codes(codes, generator=seeded(0), **arguments)
    decoding.vae.enable_slicing()
    torch.testing.assert_close(decoding.decode_codes(codes, generator=seeded(0), **arguments), whole)
    decoding.vae.enable_tiling()
    assert decoding.decode_codes(codes, generator=seeded(0), **arguments).shape == whole.shape


def test_latents_stay_in_float32(decoding_components, codes):
    turbo = ZImageTransformer2DModel.from_config(decoding_components["transformer_turbo"].config)
    pipe = quiet(LLaDAUniPipeline(**{**decoding_components, "transformer_turbo": turbo.to(torch.bfloat16)}))
    dtypes = []

    def callback(pipe, step, timestep, tensors):
        dtypes.append((tensors["latents"].dtype, tensors["image_features"].dtype))

    pipe.decode_codes(
        codes,
        num_inference_steps=2,
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["latents", "image_features"],
    )
    assert dtypes == [(torch.float32, torch.bfloat16)] * 2


GOOD = torch.zeros(1, 2, 2, dtype=torch.long)


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ({"codes": [[0]]}, TypeError, "`codes`.*list"),
        ({"codes": GOOD.float()}, TypeError, "`codes`.*float32"),
        ({"codes": GOOD[0]}, ValueError, r"`codes`.*\(2, 2\)"),
        ({"codes": GOOD[:0]}, ValueError, r"`codes`.*\(0, 2, 2\)"),
        ({"codes": GOOD + 256}, ValueError, "`codes`.*0..255.*256"),
        ({"codes": GOOD - 1}, ValueError, "`codes`.*0..255.*-1"),
        ({"decoder": "fast"}, ValueError, "`decoder`.*'turbo', 'normal'.*'fast'"),
        ({"num_inference_steps": 0}, ValueError, "`num_inference_steps`.*at least 1.*0"),
        ({"num_inference_steps": -4}, ValueError, "`num_inference_steps`.*at least 1.*-4"),
        ({"num_inference_steps": 1, "decoder": "normal"}, ValueError, "`num_inference_steps`.*at least 2"),
        ({"num_inference_steps": 2.5}, TypeError, "`num_inference_steps`.*integer.*2.5"),
        ({"num_inference_steps": True}, TypeError, "`num_inference_steps`.*integer.*True"),
        (
            {"decoder_guidance_scale": float("nan"), "decoder": "normal"},
            ValueError,
            "`decoder_guidance_scale`.*finite",
        ),
        ({"decoder_guidance_scale": -1, "decoder": "normal"}, ValueError, "`decoder_guidance_scale`.*at least 0"),
        ({"decoder_guidance_scale": "1", "decoder": "normal"}, TypeError, "`decoder_guidance_scale`.*number"),
        ({"decoder_guidance_scale": 1.0}, ValueError, "`decoder_guidance_scale`.*0.*turbo"),
        ({"upscale": 5}, ValueError, "`upscale`.*1, 2, 3, 4.*5"),
        ({"upscale": True}, ValueError, "`upscale`.*1, 2.*True"),
        ({"output_type": "jpg"}, ValueError, "`output_type`.*'pil'.*'jpg'"),
        ({"generator": 7}, TypeError, "`generator`.*int"),
        ({"generator": [seeded(0), seeded(1)]}, ValueError, "`generator`.*2 generators for 1 images"),
        ({"latents": torch.zeros(1, 16, 8, 9)}, ValueError, r"`latents`.*\(1, 16, 8, 8\).*\(1, 16, 8, 9\)"),
        ({"latents": "noise"}, TypeError, "`latents`.*str"),
        ({"callback_on_step_end": 1}, TypeError, "`callback_on_step_end`.*callable"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, ValueError, "tensor_inputs.*'latents'.*'noise'"),
        ({"callback_on_step_end_tensor_inputs": "latents"}, TypeError, "tensor_inputs.*list"),
    ],
)
def test_bad_input_to_decode_codes(decoding, arguments, error, words, monkeypatch):
    monkeypatch.setattr(decoding.semantic_embedder, "forward", lambda *args, **kwargs: pytest.fail("work was done"))
    with pytest.raises(error, match=words):
        decoding.decode_codes(**{"codes": GOOD, **arguments})


@pytest.mark.parametrize(
    "absent, words",
    [
        ({"transformer": None, "transformer_turbo": None}, "neither `transformer` nor `transformer_turbo`"),
        ({"semantic_embedder": None}, "`semantic_embedder`.*not loaded"),
        ({"vae": None}, "`vae`.*not loaded"),
        ({"scheduler_turbo": None}, "`scheduler_turbo`.*not loaded"),
    ],
)
def test_absent_component(decoding_components, absent, words):
    with pytest.raises(ValueError, match=words):
        LLaDAUniPipeline(**{**decoding_components, **absent}).decode_codes(GOOD)


@pytest.mark.parametrize(
    "scheduler, error, words",
    [
        (EulerDiscreteScheduler(), TypeError, "`scheduler_turbo`.*FlowMatchEulerDiscreteScheduler.*EulerDiscrete"),
        (FlowMatchHeunDiscreteScheduler(), TypeError, "`scheduler_turbo`.*got FlowMatchHeunDiscreteScheduler"),
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), ValueError, "`scheduler_turbo`.*dynamic"),
    ],
)
def test_schedulers_that_do_not_fit(decoding_components, scheduler, error, words, monkeypatch):
    pipe = LLaDAUniPipeline(**{**decoding_components, "scheduler_turbo": scheduler})
    monkeypatch.setattr(pipe.semantic_embedder, "forward", lambda *args, **kwargs: pytest.fail("work was done"))
    with pytest.raises(error, match=words):
        pipe.decode_codes(GOOD)
    pipe.scheduler_turbo = type("Ours", (FlowMatchEulerDiscreteScheduler,), {})()
    monkeypatch.undo()
    assert len(quiet(pipe).decode_codes(GOOD, num_inference_steps=1)) == 1


def test_other_decoder_than_loaded(decoding_components):
    pipe = LLaDAUniPipeline(**{**decoding_components, "transformer": None})
    with pytest.raises(ValueError, match="`decoder` is 'normal', but only 'turbo' is loaded"):
        pipe.decode_codes(GOOD, decoder="normal")


def test_embedder_of_another_checkpoint(decoding_components):
    other = LLaDAUniSemanticEmbedder(codebook_size=256, embedding_dim=32)
    pipe = LLaDAUniPipeline(**{**decoding_components, "semantic_embedder": other})
    with pytest.raises(ValueError, match="width 32.*64"):
        pipe.decode_codes(GOOD)


def test_grid_beyond_the_decoder_positions(decoding_components):
    config = {**decoding_components["transformer_turbo"].config, "axes_lens": [64, 8, 8]}
    short = ZImageTransformer2DModel.from_config(config)
    pipe = quiet(LLaDAUniPipeline(**{**decoding_components, "transformer_turbo": short}))
    pipe.decode_codes(torch.zeros(1, 2, 4, dtype=torch.long), num_inference_steps=1)
    for grid in ((2, 5), (4, 4)):  # too many columns; too many features
        with pytest.raises(ValueError, match=f"{grid[0]} x {grid[1]} codes.*axes_lens"):
            pipe.decode_codes(torch.zeros(1, *grid, dtype=torch.long))
    pipe.decode_codes(torch.zeros(1, 4, 4, dtype=torch.long), num_inference_steps=1, upscale=1)


# The whole pipeline, from a converted checkpoint.


@pytest.fixture(scope="module")
def loaded(converted_dir):
    return quiet(DiffusionPipeline.from_pretrained(converted_dir))


@pytest.fixture
def pipe(loaded):
    """The loaded pipeline, with images to edit made small: 6 x 8 codes for the photo of 4:3."""
    pipe = quiet(LLaDAUniPipeline(**loaded.components))
    pipe.processor.image_processor.editing_max_pixels = 12 * 32 * 32
    pipe.processor.image_processor.max_pixels = 64 * 64
    pipe.processor.image_processor.min_pixels = 32 * 32
    return pipe


@pytest.fixture
def calls(pipe, monkeypatch):
    """Arguments of every call of `generate_image_codes`."""
    seen, original = [], pipe.model.generate_image_codes

    def recorded(**kwargs):
        seen.append(kwargs)
        return original(**kwargs)

    monkeypatch.setattr(pipe.model, "generate_image_codes", recorded)
    return seen


def photo(width: int = 80, height: int = 60, seed: int = 0) -> PIL.Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels).resize((width, height), PIL.Image.Resampling.BICUBIC)


SMALL = {"height": 64, "width": 96, "num_inference_steps": 2}
FEW = {"num_inference_steps": 2, "num_steps_per_block": 2}


@pytest.mark.parametrize("slow_import", [False, True])  # slowly imported, diffusers is an ordinary module
def test_auto_loading(converted_dir, slow_import):
    script = """
import sys
import diffusers_llada_uni
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
assert type(pipe) is diffusers_llada_uni.LLaDAUniPipeline
import diffusers
assert diffusers.LLaDAUniPipeline is type(pipe)
from transformers import AutoModelForImageTextToText
assert type(pipe.model) is type(AutoModelForImageTextToText.from_pretrained(sys.argv[1] + "/model"))
"""
    environment = os.environ | ({"DIFFUSERS_SLOW_IMPORT": "TRUE"} if slow_import else {})
    subprocess.run([sys.executable, "-c", script, str(converted_dir)], check=True, env=environment)


def test_import_after_diffusers(converted_dir):
    script = """
import sys, diffusers, diffusers.pipelines
import diffusers_llada_uni
assert type(diffusers.DiffusionPipeline.from_pretrained(sys.argv[1])) is diffusers_llada_uni.LLaDAUniPipeline
"""
    subprocess.run([sys.executable, "-c", script, str(converted_dir)], check=True)


def test_text_to_image_codes_are_the_released(pipe, official_tiny):
    generation = json.loads((official_tiny / "expected" / "generation.json").read_text())
    for case in generation["text_to_image"]:
        output = pipe(
            case["prompt"],
            height=32 * case["h"],
            width=32 * case["w"],
            guidance_scale=case["cfg_scale"],
            guidance_rescale=case["cfg_rescale"],
            num_steps_per_block=case["steps"],
            generation_kwargs={"block_length": case["block_length"], "threshold": case["threshold"]},
            num_inference_steps=1,
        )
        assert output.codes[0].flatten().tolist() == case["token_ids"]
        assert output.images[0].size == (32 * case["w"], 32 * case["h"])
        assert output.thoughts is None


def test_codes_decode_to_the_image(pipe):
    output = pipe("a cat", **SMALL, generator=seeded(0), output_type="np")
    again = pipe.decode_codes(output.codes[0][None], num_inference_steps=2, generator=seeded(0), output_type="np")
    np.testing.assert_array_equal(output.images, again)


@pytest.mark.parametrize("editing_max_pixels, side", [(512 * 512, 32), (12 * 32 * 32, 6)])
def test_default_size(pipe, monkeypatch, editing_max_pixels, side):
    class Stop(Exception):
        pass

    def generate_image_codes(grid, num_steps_per_block, guidance_scale, **kwargs):
        assert (grid, num_steps_per_block, guidance_scale) == ((side, side), 8, 2.0)
        raise Stop

    pipe.processor.image_processor.editing_max_pixels = editing_max_pixels
    monkeypatch.setattr(pipe.model, "generate_image_codes", generate_image_codes)
    with pytest.raises(Stop):
        pipe("a cat")


def test_prompts_in_a_batch_equal_single_prompts(pipe, calls):
    prompts = ["a cat", "a much longer prompt about a red apple on a table"]
    generators = [seeded(i) for i in range(4)]
    greedy = {"generation_kwargs": {"do_sample": False}}
    batch = pipe(prompts, **SMALL, num_images_per_prompt=2, generator=generators, output_type="pt", **greedy)
    assert calls[0]["generator"] == generators[::2]
    assert batch.images.shape == (4, 3, 64, 96) and len(batch.codes) == 4
    assert torch.equal(batch.codes[0], batch.codes[1]) and not torch.allclose(batch.images[0], batch.images[1])
    for i in range(4):
        single = pipe(prompts[i // 2], **SMALL, generator=seeded(i), output_type="pt")
        assert torch.equal(single.codes[0], batch.codes[i])
        torch.testing.assert_close(single.images[0], batch.images[i], atol=1e-4, rtol=0)


@pytest.mark.parametrize("max_codes, sizes", [(17, [2, 2, 1]), (6, [1] * 5), (1, [1] * 5), (30, [5])])
def test_many_prompts_are_split(pipe, calls, monkeypatch, max_codes, sizes):
    prompts = ["a cat", "a dog", "a much longer prompt about a red apple on a table", "a tree", "the sea"]
    arguments = {**SMALL, "thinking": True, "thinking_kwargs": {"max_new_tokens": 8}, "output_type": "pt"}

    def run():
        return pipe(prompts, generator=[seeded(i) for i in range(5)], **arguments)

    whole = run()
    calls.clear()
    monkeypatch.setattr(code_generation, "MAX_CODES", max_codes)  # an image has 6
    split = run()
    assert [len(call["input_ids"]) for call in calls] == sizes
    assert [len(call["generator"]) for call in calls] == sizes
    assert split.thoughts == whole.thoughts and len(set(split.thoughts)) > 1
    for ours, theirs in zip(split.codes, whole.codes, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(split.images, whole.images)


def test_many_edits_are_split(pipe, calls, monkeypatch):
    pictures = [photo(), [photo(60, 80, seed=1), photo(seed=4)], photo(seed=2), photo(seed=3)]
    masks = [PIL.Image.new("L", (60, 80) if row == 1 else (80, 60), 255) for row in range(4)]
    masks[2].paste(0, (0, 0, 40, 60))

    def run():
        return pipe(
            ["a", "b", "c", "d"], image=pictures, mask_image=masks, output_type="pt", generator=seeded(0), **FEW
        )

    whole = run()
    calls.clear()
    monkeypatch.setattr(code_generation, "MAX_CODES", 2 * 48)
    split = run()
    assert [len(call["input_ids"]) for call in calls] == [2, 1, 1]
    for ours, theirs in zip([*split.codes, *split.images], [*whole.codes, *whole.images], strict=True):
        assert torch.equal(ours, theirs)


def test_latents_for_prompts_that_are_split(pipe, monkeypatch):
    monkeypatch.setattr(code_generation, "MAX_CODES", 6)
    latents = torch.randn(2, 16, 8, 12, generator=seeded(0))
    both = pipe(["a cat", "a dog"], latents=latents, generator=seeded(0), output_type="latent", **SMALL)
    assert both.images.shape == latents.shape


def test_prompts_are_not_changed(pipe):
    prompts = ["a cat", "a dog"]
    pipe(prompts, **SMALL)
    assert prompts == ["a cat", "a dog"]


def test_several_images_of_a_prompt_sample_their_codes(pipe, calls):
    several = pipe(["a cat", "a dog"], **SMALL, num_images_per_prompt=2, generator=seeded(0), output_type="latent")
    assert calls[-1]["do_sample"] and calls[-1]["input_ids"].shape[0] == 4
    assert not torch.equal(several.codes[0], several.codes[1])
    pipe("a cat", **SMALL, generator=seeded(0), output_type="latent")
    assert "do_sample" not in calls[-1]


def test_settings_of_sampling_are_not_said_to_be_of_no_use_where_codes_are_sampled(pipe, monkeypatch):
    monkeypatch.setattr(generation_configuration.logger, "warning_once", lambda text: pytest.fail(text))
    warm = {"generation_kwargs": {"temperature": 2.0}}
    pipe("a cat", **SMALL, num_images_per_prompt=2, output_type="latent", **warm)
    monkeypatch.setattr(pipe.model.generation_config, "do_sample", True)
    pipe("a cat", **SMALL, output_type="latent", **warm)


def test_a_model_whose_own_settings_sample(pipe, calls, monkeypatch):
    monkeypatch.setattr(pipe.model.generation_config, "do_sample", True)
    pipe("a cat", **SMALL, num_images_per_prompt=2, output_type="latent")
    assert calls[-1]["input_ids"].shape[0] == 2


def test_negative_prompt(pipe, calls):
    def negatives(**arguments):
        pipe(["a cat", "a dog"], **FEW, output_type="latent", **arguments)
        call = calls[-1]
        rows = zip(call["negative_input_ids"], call["negative_attention_mask"], strict=True)
        return [row[mask.bool()].tolist() for row, mask in rows]

    sizes = {"height": 64, "width": 96}
    thoughts = {"thinking": True, "thinking_kwargs": {"max_new_tokens": 4}}
    for task in (sizes, {"image": photo()}, {**sizes, **thoughts}):
        own = negatives(**task)
        assert negatives(**task, negative_prompt="") == negatives(**task, negative_prompt=["", " "]) == own
        one, other = negatives(**task, negative_prompt=["", "blurred"])
        assert one == own[0] and other != own[1]
        pipe(["blurred"], **FEW, output_type="latent", **{**task, "guidance_scale": 2.0})
        assert negatives(**task, negative_prompt="blurred") == [other, other]
        if "thinking" not in task:  # the negative prompt reads as the prompt of these words would
            assert calls[-2]["input_ids"][0].tolist() == other


@pytest.mark.parametrize("task", [{"height": 64, "width": 96}, {"image": photo()}])
def test_a_negative_prompt_changes_what_is_drawn(pipe, task):
    def codes(**arguments):
        return pipe("a cat", **FEW, output_type="latent", guidance_scale=8.0, **task, **arguments).codes[0]

    assert not torch.equal(codes(), codes(negative_prompt="blurred, ugly, a dog"))


def test_users_words_are_words(pipe):
    assert pipe("<|image|> a <|mask|> cat", **SMALL).images[0].size == (96, 64)


def test_sampled_codes_differ_per_image(pipe, calls):
    sampling = {"do_sample": True, "temperature": 5.0}
    arguments = {**SMALL, "num_images_per_prompt": 2, "generation_kwargs": sampling}
    one = pipe("a cat", **arguments, generator=[seeded(0), seeded(1)])
    assert calls[0]["input_ids"].shape[0] == 2 and len(calls[0]["generator"]) == 2
    assert not torch.equal(one.codes[0], one.codes[1])
    other = pipe("a cat", **arguments, generator=[seeded(0), seeded(2)])
    assert torch.equal(one.codes[0], other.codes[0]) and not torch.equal(one.codes[1], other.codes[1])


@pytest.mark.parametrize("upscale, size", [(1, (96, 64)), (2, (96, 64)), (4, (128, 64))])
def test_size_counts_output_pixels(pipe, calls, upscale, size):
    output = pipe("a cat", **{**SMALL, "width": size[0]}, upscale=upscale)
    assert output.images[0].size == size
    assert calls[0]["grid"] == (64 // (16 * upscale), size[0] // (16 * upscale))


def test_output_types(pipe):
    assert pipe("a cat", **SMALL, output_type="latent").images.shape == (1, 16, 8, 12)
    assert isinstance(pipe("a cat", **SMALL, output_type="np").images, np.ndarray)
    images, codes = pipe("a cat", **SMALL, return_dict=False)
    assert images[0].size == (96, 64) and codes[0].shape == (2, 3)


def test_thinking(pipe, calls):
    prompts = ["a cat", "a red apple on a table"]
    arguments = {"thinking_kwargs": {"max_new_tokens": 20}, "generation_kwargs": {"do_sample": False}}
    output = pipe(prompts, **SMALL, thinking=True, num_images_per_prompt=2, **arguments)
    assert len(output.thoughts) == len(output.images) == 4
    assert output.thoughts[0] == output.thoughts[1] and all(isinstance(thought, str) for thought in output.thoughts)
    # The thoughts stand in the prompt, between the answer's start and the header.
    tokenizer, offset = pipe.processor.tokenizer, pipe.processor.image_token_offset
    rows = zip(calls[0]["input_ids"], calls[0]["attention_mask"], output.thoughts[::2], strict=True)
    for row, mask, thought in rows:
        before, answer = tokenizer.decode(row[mask.bool() & (row < offset)]).split("<role>ASSISTANT</role>")
        assert "with a thinking process" in before
        assert answer.split("<|image|>")[0].strip() == thought


def test_thoughts_end_where_the_model_opens_a_image(pipe, monkeypatch, calls):
    tokenizer = pipe.processor.tokenizer
    written = "so red<|image|><|reserved_token_7|><|reserved_token_7|><boi>"

    def generate(input_ids, attention_mask, eos_token_id, max_new_tokens, **kwargs):
        assert pipe.processor.begin_of_image_token_id in eos_token_id
        assert tokenizer.eos_token_id in eos_token_id and max_new_tokens == 1024
        return torch.cat(
            [input_ids, tokenizer(written, add_special_tokens=False, return_tensors="pt")["input_ids"]], 1
        )

    monkeypatch.setattr(pipe.model, "generate", generate)
    assert pipe("a cat", **SMALL, thinking=True).thoughts == ["so red"]
    text = tokenizer.decode(calls[0]["input_ids"][0])
    assert text.endswith("so red<|image|><|reserved_token_2|><|reserved_token_3|><boi>")


def test_editing_keeps_the_grid_of_the_source(pipe, calls):
    output = pipe("make it blue", image=photo(), **FEW)
    assert calls[0]["grid"] == (6, 8) and output.images[0].size == (8 * 32, 6 * 32)
    assert calls[0]["guidance_scale"] == 4.0 and calls[0]["image_guidance_scale"] == 0.0
    assert calls[0]["image_grid_thw"].tolist() == [[1, 6, 8]]


def test_a_checkpoint_says_how_strongly_edits_are_guided(loaded, monkeypatch, tmp_path):
    LLaDAUniPipeline(**loaded.components, editing_guidance_scale=1.5).save_pretrained(tmp_path)
    pipe = quiet(DiffusionPipeline.from_pretrained(tmp_path))
    pipe.processor.image_processor.editing_max_pixels = 64 * 64
    scales, original = [], pipe.model.generate_image_codes

    def recorded(guidance_scale, **kwargs):
        scales.append(guidance_scale)
        return original(guidance_scale=guidance_scale, **kwargs)

    monkeypatch.setattr(pipe.model, "generate_image_codes", recorded)
    pipe("make it blue", image=photo(), **FEW)
    pipe("make it blue", image=photo(), guidance_scale=3.0, **FEW)
    pipe("a blue one", **SMALL)
    assert scales == [1.5, 3.0, 2.0]
    with pytest.raises(ValueError, match="`editing_guidance_scale` must be at least 0"):
        LLaDAUniPipeline(**loaded.components, editing_guidance_scale=-1.0)


def test_editing_to_a_given_size(pipe, calls):
    output = pipe("make it blue", image=photo(), height=64, width=32, **FEW)
    assert calls[0]["grid"] == (2, 1) and output.images[0].size == (32, 64)


def test_editing_with_references_and_image_guidance(pipe, calls):
    pipe("combine them", image=[photo(), photo(40, 40, seed=1)], image_guidance_scale=1.5, guidance_scale=3.0, **FEW)
    assert calls[0]["image_grid_thw"].shape == (2, 3) and calls[0]["input_ids"].shape[0] == 1
    assert calls[0]["image_guidance_scale"] == 1.5 and calls[0]["guidance_scale"] == 3.0
    assert calls[0]["grid"] == (6, 8)


def test_editing_a_batch_of_different_sizes_equals_single(pipe, calls):
    pictures = [photo(), [photo(60, 80, seed=1), photo(seed=4)], photo(seed=2)]
    prompts = ["make it blue", "turn it around", "add a dog"]
    generators = [seeded(i) for i in range(3)]
    batch = pipe(prompts, image=pictures, generator=generators, output_type="pt", **FEW)
    assert [call["grid"] for call in calls] == [(6, 8), (8, 6)]
    assert isinstance(batch.images, list)
    for i, picture in enumerate(pictures):
        single = pipe(prompts[i], image=picture, generator=seeded(i), output_type="pt", **FEW)
        assert torch.equal(single.codes[0], batch.codes[i])
        torch.testing.assert_close(single.images[0], batch.images[i], atol=1e-4, rtol=0)


def test_one_image_for_all_prompts(pipe, calls):
    output = pipe(["make it blue", "make it red"], image=photo(), **FEW)
    assert len(output.images) == 2 and len(calls) == 1
    assert calls[0]["image_grid_thw"].shape == (2, 3)


def source_codes(pipe, picture):
    inputs = pipe.processor.image_processor(picture, resize_mode="editing", return_tensors="pt")
    return pipe.model.get_image_codes(inputs["pixel_values"], inputs["image_grid_thw"])[0]


def test_sources_given_as_codes_are_those_of_their_images(pipe, calls):
    pictures = [photo(), [photo(60, 80, seed=1), photo(seed=4)]]
    prompts, settings = (
        ["make it blue", "turn it around"],
        {"image_guidance_scale": 1.5, "output_type": "codes", **FEW},
    )
    codes = [pipe.encode_images(picture) for picture in pictures]
    assert torch.equal(codes[0][0], source_codes(pipe, photo()))
    assert pipe.encode_images(photo(), "understanding")[0].shape == (4, 4)
    by_image = pipe(prompts, image=pictures, **settings)
    by_codes = pipe(prompts, image_codes=codes, **settings)
    assert by_codes.images == [] and "pixel_values" not in calls[-1]
    assert all(map(torch.equal, by_codes.codes, by_image.codes))

    mask = PIL.Image.new("L", (80, 60))
    mask.paste(255, (0, 0, 40, 30))  # the left upper quarter
    of_codes = torch.zeros(6, 8, dtype=torch.bool)
    of_codes[:3, :4] = True
    by_image = pipe("a dog", image=photo(), mask_image=mask, output_type="codes", **FEW)
    by_codes = pipe("a dog", image_codes=codes[0], mask_image=of_codes, output_type="codes", **FEW)
    assert torch.equal(by_codes.codes[0], by_image.codes[0])


def test_codes_need_no_decoder(pipe):
    without = quiet(LLaDAUniPipeline(**{**pipe.components, "semantic_embedder": None, "vae": None}))
    output = without("a cat", **SMALL, output_type="codes")
    assert torch.equal(output.codes[0], pipe("a cat", **SMALL).codes[0]) and output.images == []


SAMPLED = {"temperature": 5.0}


def test_the_best_of_several_candidates_is_decoded(pipe, monkeypatch):
    decoded, seen, decode = [], [], CodeDecoder.decode
    monkeypatch.setattr(CodeDecoder, "decode", lambda self, *args: decoded.append(len(args[0])) or decode(self, *args))

    def reward(prompts, image_codes, completions, completion_ids):
        seen.append((prompts, image_codes))
        assert [len(ids) for ids in completion_ids] == [6] * 8 and len(completions) == 8
        return [float(codes.sum()) for codes in image_codes]

    prompts = ["a cat", "a red apple on a table"]
    arguments = {**SMALL, "num_candidates": 4, "reward": reward, "generation_kwargs": SAMPLED}
    output = pipe(prompts, generator=[seeded(0), seeded(1)], **arguments)
    assert seen[0][0] == ["a cat"] * 4 + ["a red apple on a table"] * 4
    sums = [[int(codes.sum()) for codes in seen[0][1][4 * row : 4 * row + 4]] for row in range(2)]
    assert [int(codes.sum()) for codes in output.codes] == [max(row) for row in sums] == output.scores
    assert all(len(set(row)) > 1 for row in sums) and decoded == [2] and len(output.images) == 2
    # A prompt alone has the candidates that it has in a batch.
    arguments["reward"] = lambda image_codes, **_: [-float(codes.sum()) for codes in image_codes]
    assert int(pipe(prompts[1:], generator=[seeded(1)], **arguments).codes[0].sum()) == min(sums[1])


def test_without_candidates_nothing_is_judged(pipe, monkeypatch):
    monkeypatch.setattr(CodeGenerator, "judge", lambda *args: pytest.fail("judged"))
    assert pipe("a cat", **SMALL).scores is None


def test_answers_are_the_best_of_several(pipe):
    messages = [{"role": "user", "content": [{"type": "image", "image": photo()}, {"type": "text", "text": "what?"}]}]
    settings = {"max_new_tokens": 8, "temperature": 3.0}

    def reward(prompts, completions, completion_ids):
        assert prompts == [messages] * 3 and len(completions) == len(completion_ids) == 3
        return [float(text == max(completions)) for text in completions]

    answers = pipe.chat(messages, num_return_sequences=3, do_sample=True, generator=seeded(0), **settings)
    best = pipe.chat(messages, num_candidates=3, reward=reward, generator=seeded(0), **settings)
    assert best == max(answers) and len(set(answers)) == 3
    both = pipe.chat([messages] * 2, num_candidates=3, generator=[seeded(i) for i in range(6)], **settings)
    assert len(both) == 2 and both[0] == pipe.chat(
        messages, num_candidates=3, generator=[seeded(i) for i in range(3)], **settings
    )
    for arguments, words in (
        ({"do_sample": False}, "`num_candidates`.*`do_sample=True`"),
        ({"temperature": 0.0}, "`num_candidates`.*`temperature` of 0"),
        ({"reward": lambda **_: [1.0]}, "`reward`.*3"),
    ):
        with pytest.raises(ValueError, match=words):
            pipe.chat(messages, num_candidates=3, **{**settings, **arguments})
    for name, value in (("num_return_sequences", 2), ("streamer", TextStreamer(pipe.processor.tokenizer))):
        with pytest.raises(TypeError, match=f"`num_candidates`.*`{name}`"):
            pipe.chat(messages, num_candidates=3, **{name: value}, **settings)


def test_infilling_keeps_the_codes_outside_of_the_mask(pipe, calls):
    picture, mask = photo(), PIL.Image.new("L", (80, 60))
    mask.paste(255, (0, 0, 40, 30))
    source = source_codes(pipe, picture)
    output = pipe("a dog", image=picture, mask_image=mask, **FEW)
    regenerated = torch.zeros(6, 8, dtype=torch.bool)
    regenerated[:3, :4] = True
    assert torch.equal(calls[0]["image_codes_mask"].view(6, 8), regenerated)
    assert torch.equal(output.codes[0][~regenerated], source[~regenerated])
    assert not torch.equal(output.codes[0][regenerated], source[regenerated])


def test_infilling_a_batch(pipe):
    pictures = [[photo(), photo(seed=2)], photo(seed=1), photo(60, 80, seed=3)]
    masks = [np.zeros((60, 80), bool), torch.zeros(60, 80), PIL.Image.new("RGB", (60, 80))]
    masks[0][30:] = True
    masks[1][:, 40:] = 1.0
    masks[2].paste((255, 255, 255), (0, 0, 60, 10))
    output = pipe(["a", "b", "c"], image=pictures, mask_image=masks, **FEW)
    kept = [torch.ones(6, 8, dtype=torch.bool), torch.ones(6, 8, dtype=torch.bool), torch.ones(8, 6, dtype=torch.bool)]
    kept[0][3:], kept[1][:, 4:], kept[2][:1] = False, False, False
    for i, source in enumerate([pictures[0][0], pictures[1], pictures[2]]):
        assert torch.equal(output.codes[i][kept[i]], source_codes(pipe, source)[kept[i]]), i


def test_outpainting(pipe):
    canvas = PIL.Image.new("RGB", (80, 60), "gray")
    canvas.paste(photo(40, 60), (0, 0))
    mask = PIL.Image.new("1", (80, 60))
    mask.paste(1, (40, 0, 80, 60))
    output = pipe("a wide landscape", image=canvas, mask_image=mask, **FEW)
    assert torch.equal(output.codes[0][:, :4], source_codes(pipe, canvas)[:, :4])
    assert output.images[0].size == (256, 192)


def test_thin_strokes_are_not_lost(pipe):
    mask = PIL.Image.new("L", (800, 600))
    mask.paste(255, (0, 350, 800, 351))  # one of 600 rows; the image is shrunk to 96
    touched = touched_codes(mask, pipe.processor.image_processor)
    assert touched.any(dim=1).tolist() == [False, False, False, True, False, False]
    assert touched[3].all()


def test_chat(pipe):
    text = pipe.chat([{"role": "user", "content": "hello"}], max_new_tokens=8)
    assert isinstance(text, str) and "<role>" not in text
    turn = [{"type": "image", "image": photo()}, {"type": "text", "text": "What is this?"}]
    conversation = [{"role": "user", "content": turn}]
    answer = pipe.chat(conversation, max_new_tokens=8)
    assert pipe.chat([conversation, conversation], max_new_tokens=8) == [answer, answer]
    several = pipe.chat(conversation, max_new_tokens=8, do_sample=True, num_return_sequences=3)
    assert len(several) == 3 and all(isinstance(text, str) for text in several)


def test_chat_streams(pipe):
    pieces = []

    class Streamer:
        def put(self, ids):
            pieces.append(ids)

        def end(self):
            pieces.append("end")

    pipe.chat([{"role": "user", "content": "hello"}], max_new_tokens=8, streamer=Streamer())
    assert pieces[-1] == "end" and len(pieces) >= 3


def interleaved_ids(pipe, *parts):
    processor, ids = pipe.processor, []
    for part in parts:
        if isinstance(part, str):
            ids += processor.tokenizer(part, add_special_tokens=False)["input_ids"]
        else:
            numbers = [processor.grid_token_ids[side] for side in part.shape]
            ids += [processor.image_start_token_id, *numbers, processor.begin_of_image_token_id]
            ids += (part.flatten() + processor.image_token_offset).tolist() + [processor.image_end_token_id]
    return torch.tensor([ids])


def test_interleave_gives_text_and_images_in_order(pipe, monkeypatch):
    def generate_interleaved(input_ids, max_images, guidance_scale, uncondition_ids, grid, **kwargs):
        assert max_images == 3 and guidance_scale == 2.0 and grid is None
        assert pipe.processor.tokenizer.decode(uncondition_ids[0]) == "<uncondition>"
        new = interleaved_ids(
            pipe,
            "once",
            torch.arange(6).view(2, 3),
            "upon",
            torch.arange(6).view(3, 2),
            torch.arange(6).view(2, 3),
            "a",
        )
        return torch.cat([input_ids, new], dim=1)

    monkeypatch.setattr(pipe.model, "generate_interleaved", generate_interleaved)
    parts = pipe.interleave("a story", max_images=3, num_inference_steps=2, generator=seeded(0))
    shown = [part if isinstance(part, str) else part.size for part in parts]
    assert shown == ["once", (96, 64), "upon", (64, 96), (96, 64), "a"]


def test_interleave_with_the_model(pipe, monkeypatch):
    generate = pipe.model.generate

    def opens_a_image(input_ids, *args, **kwargs):
        generate(input_ids, *args, **kwargs)
        new = interleaved_ids(pipe, "look")[0].tolist() + [pipe.processor.begin_of_image_token_id]
        return torch.cat([input_ids, torch.tensor([new])], dim=1)

    monkeypatch.setattr(pipe.model, "generate", opens_a_image)
    parts = pipe.interleave(
        "a story",
        image=photo(),
        max_images=2,
        height=64,
        width=96,
        image_guidance_scale=0.5,
        num_inference_steps=1,
        generation_kwargs={"max_new_tokens": 4},
    )
    assert [part if isinstance(part, str) else part.size for part in parts] == ["look", (96, 64)] * 2


def test_settings_that_take_no_sampling_may_be_given():
    check_generation_kwargs("generation_kwargs", {"self_speculation": True})
    with pytest.raises(ValueError, match="`generation_kwargs`.*`do_sample=True`"):
        check_generation_kwargs("generation_kwargs", {"self_speculation": True, "do_sample": True})


def test_interleave_may_write_only(pipe, monkeypatch):
    ids = {"generate_interleaved": lambda input_ids, **kwargs: torch.cat([input_ids, interleaved_ids(pipe, "no")], 1)}
    monkeypatch.setattr(pipe.model, "generate_interleaved", ids["generate_interleaved"])
    assert pipe.interleave("a story") == ["no"]


def test_the_halves_can_stand_apart(pipe):
    expected = pipe("a cat", **SMALL, generator=seeded(0), output_type="pt")
    coder = CodeGenerator(pipe.model, pipe.processor)
    (group,) = coder.write_prompts(["a cat"], coder.grid_of(64, 96))
    codes = coder.generate(group, CodeGenerationSettings(), seeded(0))
    decoder = CodeDecoder(
        pipe.semantic_embedder, pipe.vae, {"turbo": pipe.transformer_turbo}, {"turbo": pipe.scheduler_turbo}
    )
    settings = decoder.settle(num_inference_steps=2, output_type="pt")
    assert torch.equal(codes[0], expected.codes[0])
    assert torch.equal(decoder.decode(codes, settings, seeded(0)), expected.images)


def test_what_type_checkers_see():
    assert typing.get_type_hints(LLaDAUniPipeline.__call__)["return"] is LLaDAUniPipelineOutput
    assert typing.get_type_hints(LLaDAUniPipeline.from_pretrained)["return"] is typing.Self


def test_progress_bars_of_the_language_model(pipe, calls, capsys):
    pipe("a cat", **SMALL)
    assert capsys.readouterr().err == ""
    pipe.set_progress_bar_config(disable=False)
    pipe(["a cat", "make it blue"], image=[photo(), photo(60, 80)], **FEW)  # of two sizes, in one bar each
    bars = capsys.readouterr().err
    assert "image codes: 100%" in bars and "96/96" in bars and "decoding: 100%" in bars and "4/4" in bars
    pipe.set_progress_bar_config(desc="mine")
    pipe("a cat", **SMALL)
    assert "mine: 100%" in (bars := capsys.readouterr().err) and "codes" not in bars


@pytest.mark.parametrize("loader", [DiffusionPipeline, LLaDAUniPipeline])
def test_save_and_load(loaded, loader, tmp_path):
    loaded.save_pretrained(tmp_path, max_shard_size="100KB")
    assert not list(tmp_path.rglob("*.bin")) and list((tmp_path / "model").glob("model-*.safetensors"))
    again = quiet(loader.from_pretrained(tmp_path))
    assert type(again) is LLaDAUniPipeline
    for name, component in loaded.components.items():
        if isinstance(component, torch.nn.Module):
            other = getattr(again, name).state_dict()
            assert all(torch.equal(tensor, other[key]) for key, tensor in component.state_dict().items()), name
    arguments = {**SMALL, "output_type": "np"}
    ours, theirs = loaded("a cat", **arguments, generator=seeded(0)), again("a cat", **arguments, generator=seeded(0))
    assert torch.equal(ours.codes[0], theirs.codes[0])
    # Equal weights elsewhere in memory: on some processors kernels go by their alignment.
    np.testing.assert_allclose(ours.images, theirs.images, rtol=0, atol=1e-4)


@pytest.mark.parametrize("loader", [DiffusionPipeline, LLaDAUniPipeline])
def test_load_the_decoding_half_only(converted_dir, loader, tmp_path):
    absent = {"model": None, "processor": None, "transformer": None, "scheduler": None}
    pipe = quiet(loader.from_pretrained(converted_dir, **absent))
    assert pipe.model is None and pipe.loaded_decoders == ["turbo"]
    pipe.save_pretrained(tmp_path)
    assert not (tmp_path / "model").exists() and not (tmp_path / "transformer").exists()
    again = quiet(loader.from_pretrained(tmp_path))
    assert again.model is None and len(again.decode_codes(GOOD, num_inference_steps=1)) == 1
    with pytest.raises(ValueError, match="`model`, which is not loaded"):
        again("a cat")


def test_dtype_per_component(converted_dir):
    dtypes = {"transformer_turbo": torch.bfloat16, "vae": torch.float16, "default": torch.float32}
    pipe = quiet(DiffusionPipeline.from_pretrained(converted_dir, dtype=dtypes))
    assert pipe.transformer_turbo.dtype == torch.bfloat16 and pipe.vae.dtype == torch.float16
    assert pipe.model.dtype == pipe.transformer.dtype == torch.float32
    pipe.vae.to(torch.float32)  # half precision convolutions are not for every CPU
    assert pipe("a cat", **SMALL).images[0].size == (96, 64)


def test_all_in_bfloat16(converted_dir):
    pipe = quiet(DiffusionPipeline.from_pretrained(converted_dir, dtype=torch.bfloat16))
    pipe.processor.image_processor.editing_max_pixels = 4 * 32 * 32
    assert pipe("a cat", **SMALL, output_type="latent").images.dtype == torch.float32
    assert pipe("make it blue", image=photo(), **FEW).images[0].mode == "RGB"


def run_all(pipe):
    edited = pipe("make it blue", image=photo(), generator=seeded(0), output_type="pt", **FEW)
    normal = pipe("a cat", **SMALL, decoder="normal", generator=seeded(0), output_type="pt")
    chat = pipe.chat([{"role": "user", "content": [{"type": "image", "image": photo()}]}], max_new_tokens=4)
    return edited.images, normal.images, chat


@pytest.fixture
def offloadable(converted_dir):
    pipe = quiet(DiffusionPipeline.from_pretrained(converted_dir))
    pipe.processor.image_processor.editing_max_pixels = 12 * 32 * 32
    return pipe


def test_model_cpu_offload(offloadable):
    reference = run_all(offloadable)
    offloadable.enable_model_cpu_offload(device="cpu")
    entered = []
    for name in ("model", "transformer", "vae"):
        hook = getattr(offloadable, name)._hf_hook
        pre_forward = hook.pre_forward

        def recorded(*args, name=name, pre_forward=pre_forward, **kwargs):
            entered.append(name)
            return pre_forward(*args, **kwargs)

        hook.pre_forward = recorded
    offloadable("a cat", **SMALL, decoder="normal")
    assert list(dict.fromkeys(entered)) == ["model", "transformer", "vae"]
    for _ in range(2):  # the hooks are put back after a call
        for ours, theirs in zip(run_all(offloadable), reference, strict=True):
            if isinstance(ours, str):
                assert ours == theirs
            else:
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_a_call_that_fails_leaves_nothing_on_the_card(offloadable):
    def fails(*args):
        raise RuntimeError("stop")

    offloadable.enable_model_cpu_offload(device="cpu")
    hook = offloadable.transformer_turbo._hf_hook
    with pytest.raises(RuntimeError, match="stop"):
        offloadable("a cat", **SMALL, callback_on_step_end=fails)
    assert offloadable.transformer_turbo._hf_hook is not hook  # all were made anew, from main memory


def test_sequential_cpu_offload(offloadable, monkeypatch):
    def chosen() -> torch.Tensor:
        return offloadable("a cat", **SMALL, num_candidates=2, generator=seeded(0), output_type="codes").codes[0]

    reference, wanted = run_all(offloadable), chosen()
    # Here the accelerator is the CPU too. diffusers would call it "cpu:0", and moving a parameter from "cpu" to
    # "cpu:0" makes it an ordinary tensor, which accelerate does not expect.
    original = accelerate.cpu_offload
    monkeypatch.setattr(
        accelerate, "cpu_offload", lambda model, device, **kwargs: original(model, torch.device("cpu"), **kwargs)
    )
    offloadable.enable_sequential_cpu_offload(device="cpu")
    assert offloadable.model.lm_head.weight.device.type == "meta"
    assert torch.equal(chosen(), wanted)  # judged by weights that travel
    for ours, theirs in zip(run_all(offloadable), reference, strict=True):
        assert ours == theirs if isinstance(ours, str) else torch.equal(ours, theirs)


class AwayUnlessCalled(ModelHook):
    """Group offloading at the leaves, as far as it can be had without a second device: weights elsewhere are NaN."""

    def initialize_hook(self, module):
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        self.weights = [(tensor, tensor.data) for tensor in tensors if tensor.is_floating_point()]
        self.post_forward(module, None)
        return module

    def pre_forward(self, module, *args, **kwargs):
        for tensor, weight in self.weights:
            tensor.data = weight
        return args, kwargs

    def post_forward(self, module, output):
        for tensor, weight in self.weights:
            tensor.data = torch.full_like(weight, torch.nan)
        return output


def test_group_offload(offloadable):
    reference = run_all(offloadable)
    for component in offloadable.components.values():
        for module in component.modules() if isinstance(component, torch.nn.Module) else ():
            HookRegistry.check_if_exists_or_initialize(module).register_hook(AwayUnlessCalled(), "away")
    assert offloadable.model.lm_head.weight.isnan().all()
    for ours, theirs in zip(run_all(offloadable), reference, strict=True):
        assert ours == theirs if isinstance(ours, str) else torch.equal(ours, theirs)
    assert offloadable.model.lm_head.weight.isnan().all()


def test_group_offload_by_blocks(offloadable, monkeypatch):
    """Without a second device: what computes belongs to a group, which has been fetched before."""
    reference, made, fetched = run_all(offloadable), [], []
    make, fetch = ModuleGroup.__init__, ModuleGroup.onload_

    def recorded_make(self, **kwargs):
        make(self, **kwargs)
        made.append(self)

    monkeypatch.setattr(ModuleGroup, "__init__", recorded_make)
    monkeypatch.setattr(ModuleGroup, "onload_", lambda self: fetched.append(self) or fetch(self))
    settings = {"offload_type": "block_level", "num_blocks_per_group": 1}
    offloadable.enable_group_offload(torch.device("cpu"), torch.device("cpu"), **settings)
    for ours, theirs in zip(run_all(offloadable), reference, strict=True):
        assert ours == theirs if isinstance(ours, str) else torch.equal(ours, theirs)
    names = {module: name for name, module in offloadable.model.named_modules()}
    own = [group for group in made if group.onload_leader in names]
    unused = {names[group.onload_leader] for group in own if group not in fetched}
    assert len(own) > 10 and unused == {"model.vqmodel.post_quant_conv"}  # of what draws nothing here


IMAGE = photo()
MASK = PIL.Image.new("L", (80, 60), 255)


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ({"prompt": ""}, ValueError, "`prompt`.*empty"),
        ({"prompt": "  "}, ValueError, "`prompt`.*empty"),
        ({"prompt": []}, ValueError, "`prompt`.*empty list"),
        ({"prompt": ["a cat", ""]}, ValueError, "`prompt`.*empty.*1"),
        ({"prompt": ["a cat", 3]}, TypeError, "`prompt`.*int at index 1"),
        ({"prompt": None}, TypeError, "`prompt`.*NoneType"),
        ({"height": 100}, ValueError, "`height`.*multiple of 32.*100.*96"),
        ({"width": 1000}, ValueError, "`width`.*multiple of 32.*1000.*992"),
        (
            {"height": 1024, "width": 1008, "upscale": 1},
            ValueError,
            "`height` may be at most 2016.*`upscale` 2; at 1 they are 0.5 times as large",
        ),
        ({"width": 1000, "upscale": 1}, ValueError, "`width`.*multiple of 16.*1000.*1008"),
        ({"height": 0}, ValueError, "`height`.*at least 1.*0"),
        ({"height": -32}, ValueError, "`height`.*at least 1.*-32"),
        ({"height": 64.0}, TypeError, "`height`.*integer.*64.0"),
        ({"height": 32 * 2000, "width": 32}, ValueError, "`height`.*at most"),
        ({"height": 1600, "width": 1600}, ValueError, "`height` and `width`.*positions"),
        ({"num_inference_steps": -1}, ValueError, "`num_inference_steps`.*at least 1.*-1"),
        ({"num_steps_per_block": 0}, ValueError, "`num_steps_per_block`.*at least 1.*0"),
        ({"num_images_per_prompt": 0}, ValueError, "`num_images_per_prompt`.*at least 1"),
        ({"guidance_scale": float("nan")}, ValueError, "`guidance_scale`.*finite.*nan"),
        ({"guidance_scale": float("inf")}, ValueError, "`guidance_scale`.*finite.*inf"),
        ({"guidance_scale": -1.0}, ValueError, "`guidance_scale`.*at least 0.*-1"),
        ({"guidance_scale": "high"}, TypeError, "`guidance_scale`.*number.*high"),
        ({"guidance_rescale": 1.5}, ValueError, "`guidance_rescale`.*at least 0 and at most 1.*1.5"),
        ({"image_guidance_scale": 1.0}, ValueError, "`image_guidance_scale`.*`image`"),
        ({"decoder": "slow"}, ValueError, "`decoder`.*'turbo', 'normal'.*'slow'"),
        ({"upscale": 5}, ValueError, "`upscale`.*1, 2, 3, 4.*5"),
        ({"output_type": "png"}, ValueError, "`output_type`.*'pil'.*'png'"),
        ({"generator": 0}, TypeError, r"`generator`.*int.*torch.Generator\(\).manual_seed\(0\)"),
        ({"negative_prompt": 3}, TypeError, "`negative_prompt`.*int"),
        ({"negative_prompt": ["a", "b"]}, ValueError, "`negative_prompt`.*2 entries for 1 prompts"),
        ({"negative_prompt": "a", "guidance_scale": 1.0}, ValueError, "`negative_prompt`.*`guidance_scale` is 1"),
        ({"generator": [seeded(0)] * 3}, ValueError, "`generator`.*3 generators for 1 images"),
        ({"num_images_per_prompt": 2, "generator": [seeded(0)]}, ValueError, "`generator`.*1 generators for 2"),
        ({"latents": torch.zeros(1, 16, 9, 8), **SMALL}, ValueError, r"`latents`.*\(1, 16, 8, 12\)"),
        ({"thinking": "yes"}, TypeError, "`thinking`.*True or False.*yes"),
        ({"thinking": True, "image": IMAGE}, ValueError, "`thinking`.*`image`"),
        ({"thinking_kwargs": {"max_new_tokens": 8}}, ValueError, "`thinking_kwargs`.*`thinking` is False"),
        ({"thinking": True, "thinking_kwargs": {"max_tokens": 8}}, TypeError, "`thinking_kwargs`.*max_tokens"),
        ({"generation_kwargs": {"temperatur": 1.0}}, TypeError, "`generation_kwargs`.*temperatur"),
        ({"generation_kwargs": {"threshold": 2.0}}, ValueError, "`generation_kwargs`.*threshold.*2.0"),
        ({"generation_kwargs": [1]}, TypeError, "`generation_kwargs`.*dict"),
        (
            {"generation_kwargs": {"self_speculation": True}, "thinking": True},
            TypeError,
            "`generation_kwargs` takes no `self_speculation`: image codes",
        ),
        ({"generation_kwargs": {"stop_strings": "."}}, TypeError, "`generation_kwargs`.*`height`.*`stop_strings`"),
        (
            {"generation_kwargs": {"guidance_ramp": (0, 1)}, "guidance_scale": 1.0},
            ValueError,
            "`guidance_ramp` is given, but there is no guidance",
        ),
        (
            {"generation_kwargs": {"do_sample": True, "num_return_sequences": 2}},
            TypeError,
            "`generation_kwargs`.*`num_images_per_prompt`.*`num_return_sequences`",
        ),
        ({"callback_on_step_end": "print"}, TypeError, "`callback_on_step_end`.*callable"),
        ({"mask_image": MASK}, ValueError, "`mask_image`.*`image`"),
        ({"image": 5}, TypeError, "`image`.*int"),
        ({"image": []}, ValueError, "`image`.*empty"),
        ({"image": "/no/such/picture.png"}, ValueError, "`image`.*/no/such/picture.png"),
        ({"image": [[[IMAGE]]]}, ValueError, "`image`.*one list of images"),
        ({"prompt": ["a", "b"], "image": [IMAGE]}, ValueError, "`image`.*1 entries for 2 prompts"),
        ({"image": IMAGE, "height": 64}, ValueError, "`height` and `width`.*together"),
        ({"image": IMAGE, "mask_image": MASK.resize((8, 6))}, ValueError, "`mask_image`.*80 x 60.*8 x 6"),
        ({"image": IMAGE, "mask_image": MASK.point(lambda v: 0)}, ValueError, "`mask_image`.*black"),
        ({"image": IMAGE, "mask_image": [MASK, MASK]}, ValueError, "`mask_image`.*2 entries for 1 prompts"),
        ({"image": IMAGE, "mask_image": 1.0}, TypeError, "`mask_image`.*float"),
        ({"image": IMAGE, "mask_image": MASK, **SMALL}, ValueError, "`height` and `width`.*`mask_image`"),
        ({"prompt": "a cat " * 3000}, ValueError, "positions"),
        ({"num_candidates": 0}, ValueError, "`num_candidates`.*at least 1"),
        ({"num_candidates": 2.0}, TypeError, "`num_candidates`.*integer"),
        ({"reward": len}, ValueError, "`reward`.*`num_candidates` is 1"),
        ({"num_candidates": 2, "reward": "best"}, TypeError, "`reward`.*callable.*str"),
        ({"num_candidates": 2, "generation_kwargs": {"do_sample": False}}, ValueError, "`num_candidates`.*the same"),
        ({"num_candidates": 2, "generation_kwargs": {"temperature": 0.0}}, ValueError, "`num_candidates`.*the same"),
        ({"num_candidates": 2, "image": IMAGE}, ValueError, "`num_candidates`.*`reward` for edits"),
        ({"output_type": "codes", "latents": torch.zeros(1, 16, 8, 12)}, ValueError, "`latents`.*'codes'"),
        ({"output_type": "codes", "upscale": 0}, ValueError, "`upscale`"),
        ({"upscale": 2.0}, ValueError, "`upscale` must be one of 1, 2, 3, 4, got 2.0"),
        ({"image": IMAGE, "image_codes": GOOD[0]}, ValueError, "`image` and `image_codes`"),
        ({"image_codes": GOOD}, ValueError, r"`image_codes`.*\(1, 2, 2\)"),
        ({"image_codes": GOOD[0].float()}, ValueError, "`image_codes`.*float32"),
        ({"image_codes": IMAGE}, TypeError, "`image_codes`.*Image"),
        ({"image_codes": GOOD[0] + 256}, ValueError, "`image_codes`.*0..255.*256"),
        ({"image_codes": []}, ValueError, "`image_codes`"),
        ({"image_codes": GOOD[0], "thinking": True}, ValueError, "`thinking`.*`image_codes`"),
        ({"prompt": ["a", "b"], "image_codes": [GOOD[0]]}, ValueError, "`image_codes`.*1 entries for 2 prompts"),
        ({"image_codes": GOOD[0], "mask_image": MASK}, ValueError, "`mask_image`.*2 x 2.*80 x 60"),
    ],
)
def test_bad_input(pipe, arguments, error, words, monkeypatch):
    for name in ("generate", "generate_image_codes", "get_image_codes"):
        monkeypatch.setattr(pipe.model, name, lambda *args, **kwargs: pytest.fail("work was done"))
    with pytest.raises(error, match=words):
        pipe(**{"prompt": "a cat", **arguments})


def test_latents_for_images_of_different_sizes(pipe):
    with pytest.raises(ValueError, match="`latents`.*different sizes"):
        pipe(["a", "b"], image=[photo(), photo(60, 80)], latents=torch.zeros(2, 16, 24, 32))


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ({"prompt": ["a"]}, TypeError, "`prompt`.*string.*list"),
        ({"prompt": ""}, ValueError, "`prompt`.*empty"),
        ({"max_images": 0}, ValueError, "`max_images`.*at least 1"),
        ({"height": 64}, ValueError, "`height` and `width`.*together"),
        ({"height": 65, "width": 64}, ValueError, "`height`.*multiple of 32.*65.*64"),
        ({"generator": [seeded(0)]}, TypeError, "`generator`.*one"),
        ({"guidance_scale": float("nan")}, ValueError, "`guidance_scale`.*finite"),
        ({"num_inference_steps": 0}, ValueError, "`num_inference_steps`"),
        ({"generation_kwargs": {"tokens": 5}}, TypeError, "`generation_kwargs`.*tokens"),
    ],
)
def test_bad_input_to_interleave(pipe, arguments, error, words, monkeypatch):
    monkeypatch.setattr(pipe.model, "generate_interleaved", lambda *args, **kwargs: pytest.fail("work was done"))
    with pytest.raises(error, match=words):
        pipe.interleave(**{"prompt": "a story", **arguments})


@pytest.mark.parametrize("messages", [[], "hello", None, ["hello"], [{"role": "user"}], [[{"content": "hello"}]]])
def test_bad_input_to_chat(pipe, messages):
    with pytest.raises(ValueError, match="`messages`"):
        pipe.chat(messages)
