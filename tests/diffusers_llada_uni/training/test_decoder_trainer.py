"""The decoder's training by flow matching: the formula, and that images get closer to what their codes stand for."""

import copy

import pytest
import torch
from datasets import Dataset, Image, load_from_disk
from diffusers import AutoencoderKL
from PIL import Image as PILImage
from transformers import AutoModelForImageTextToText, AutoProcessor

from diffusers_llada_uni import LLaDAUniPipeline
from diffusers_llada_uni.training import (
    LLaDAUniDecoderConfig,
    LLaDAUniDecoderTrainer,
    prepare_decoder_dataset,
)
from tests.common import assert_resumed_equals_uninterrupted
from tests.diffusers_llada_uni.training.decoder_common import (
    RUN,
    dataset_of_images,
    image_error,
    make_components,
    make_pipeline,
)


def make_trainer(output_dir, components=None, dataset=None, **settings):
    transformer, semantic_embedder = make_components() if components is None else components
    return LLaDAUniDecoderTrainer(
        transformer,
        semantic_embedder,
        LLaDAUniDecoderConfig(str(output_dir), **{**RUN, "per_device_train_batch_size": 4, **settings}),
        train_dataset=dataset_of_images(16) if dataset is None else dataset,
        eval_dataset=dataset_of_images(8, seed=9),
    )


def batch_of(trainer, num_rows=4):
    return trainer.data_collator([trainer.train_dataset[i] for i in range(num_rows)])


# Loss


def test_loss_equals_the_formula(tmp_path):
    trainer = make_trainer(tmp_path, condition_dropout=0.5)
    trainer.model.eval()
    inputs = batch_of(trainer)
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, inputs)
        trainer.callback_handler.call_event("on_evaluate", trainer.args, trainer.state, trainer.control)
        sigmas, noises, is_conditional = trainer.draw(inputs["latents"])
        assert 0 < is_conditional.sum() < 4
        transformer, semantic_embedder = make_components()
        errors = []
        for row in range(4):
            latents, noise, sigma = inputs["latents"][row], noises[row], sigmas[row]
            features = semantic_embedder(inputs["codes"][row][None]).sample
            features = features if is_conditional[row] else torch.zeros_like(features)
            noisy = (1 - sigma) * latents + sigma * noise
            output = transformer(
                [noisy[:, None]], (1 - sigma)[None], [features[0]], patch_size=2, f_patch_size=1, return_dict=False
            )[0][0]
            errors.append((output[:, 0] - (latents - noise)).square().mean())
    torch.testing.assert_close(loss, torch.stack(errors).mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal"])
def test_noise_levels_have_their_distribution(tmp_path, sampling):
    settings = {"logit_mean": 0.5, "logit_std": 0.8} if sampling == "logit_normal" else {}
    trainer = make_trainer(tmp_path, timestep_sampling=sampling, timestep_shift=3.0, condition_dropout=0.2, **settings)
    sigmas, _, is_conditional = trainer.draw([torch.zeros(1, 2, 2)] * 4000)
    unshifted = sigmas / (3 - 2 * sigmas)  # the shift the other way round
    if sampling == "uniform":
        assert unshifted.mean().item() == pytest.approx(0.5, abs=0.02)
        assert unshifted.var().item() == pytest.approx(1 / 12, abs=0.01)
    else:
        logits = unshifted.logit()
        assert logits.mean().item() == pytest.approx(0.5, abs=0.05)
        assert logits.std().item() == pytest.approx(0.8, abs=0.05)
    assert is_conditional.float().mean().item() == pytest.approx(0.8, abs=0.03)


def test_images_of_different_sizes_share_a_batch(tmp_path):
    rows = [dataset_of_images(1, grid=grid)[0] for grid in ((1, 2), (2, 1))]
    trainer = make_trainer(tmp_path, dataset=Dataset.from_list(rows))
    trainer.model.eval()
    with torch.no_grad():
        both = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
        trainer.callback_handler.call_event("on_evaluate", trainer.args, trainer.state, trainer.control)
        alone = [trainer.compute_loss(trainer.model, trainer.data_collator([row])) for row in rows]
    torch.testing.assert_close(both, torch.stack(alone).mean(), rtol=1e-4, atol=1e-5)


# Training


def test_the_loss_falls_and_images_get_closer(trained_decoder):
    trainer, folder = trained_decoder
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.6 * losses[0]
    components = make_components()
    before = image_error(make_pipeline(*components), "normal", 12)
    trained = [
        type(part).from_pretrained(folder / name)
        for part, name in zip(components, ("transformer", "semantic_embedder"), strict=True)
    ]
    assert image_error(make_pipeline(*trained), "normal", 12) < 0.6 * before
    # What was saved is the average, not the last weights
    last = trainer.model.transformer.all_x_embedder["2-1"].weight
    assert not torch.equal(trained[0].all_x_embedder["2-1"].weight, last)


@pytest.mark.parametrize(
    ("settings", "frozen"),
    [
        ({"stage": "warmup"}, ("semantic_embedder.", "transformer.cap_", "transformer.context_refiner.")),
        ({"stage": "all_domains"}, ()),
        ({"stage": "refinement"}, ()),
        ({"trained_parts": ["image_layers", "semantic_refiner"]}, ("semantic_embedder.",)),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, dict) else None,
)
def test_a_stage_trains_what_it_says(tmp_path, settings, frozen):
    trainer = make_trainer(tmp_path, max_steps=1, learning_rate=1e-2, lr_scheduler_type="constant", **settings)
    old = {name: tensor.clone() for name, tensor in trainer.model.named_parameters()}
    trainer.train()
    kept = {name for name, tensor in trainer.model.named_parameters() if torch.equal(tensor, old[name])}
    assert kept == {name for name in old if name.startswith(frozen)}


def test_stages_have_their_learning_rates_and_the_default_trains_all(tmp_path):
    default, refinement = (LLaDAUniDecoderConfig(str(tmp_path), **RUN, **s) for s in ({}, {"stage": "refinement"}))
    assert default.stage == "all_domains" and default.learning_rate == 1e-4
    assert refinement.learning_rate == 1e-5
    assert all(parameter.requires_grad for parameter in make_trainer(tmp_path).model.parameters())


def test_resumed_run_equals_the_uninterrupted_one(tmp_path):
    settings = {"learning_rate": 1e-3, "ema_decay": 0.9, "lr_scheduler_type": "constant"}
    whole, resumed = assert_resumed_equals_uninterrupted(make_trainer, tmp_path, **settings)
    averages = resumed.trained_model().state_dict()
    for name, tensor in whole.trained_model().state_dict().items():
        assert torch.equal(tensor, averages[name]), name


# Data


@pytest.fixture(scope="module")
def encoders(converted_dir):
    processor = AutoProcessor.from_pretrained(converted_dir / "processor")
    processor.image_processor.editing_max_pixels = 12 * 32 * 32
    return {
        "model": AutoModelForImageTextToText.from_pretrained(converted_dir / "model"),
        "processing_class": processor,
        "vae": AutoencoderKL.from_pretrained(converted_dir / "vae").eval(),
    }


def picture(size=(96, 64)):
    noise = torch.randint(0, 256, (6, 9, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return PILImage.fromarray(noise.numpy()).resize(size)


def test_images_become_codes_and_latents(encoders, tmp_path):
    dataset = Dataset.from_dict({"image": [picture()], "caption": ["?"]}).cast_column("image", Image())
    dataset.save_to_disk(tmp_path)
    image_processor = encoders["processing_class"].image_processor
    arguments = (encoders["model"], image_processor, encoders["vae"])
    row = prepare_decoder_dataset(load_from_disk(tmp_path), *arguments)[0]
    height, width = row["grid"]
    inputs = image_processor([[picture()]], resize_mode="editing", return_tensors="pt")
    (codes,) = encoders["model"].get_image_codes(inputs["pixel_values"], inputs["image_grid_thw"])
    assert tuple(codes.shape) == (height, width) and row["codes"] == codes.flatten().tolist()
    pixels = torch.tensor(row["latents"]).view(1, 16, 4 * height, 4 * width)
    config = encoders["vae"].config
    with torch.no_grad():
        target = (
            encoders["vae"]
            .encode(
                torch.zeros(1, 3, 32 * height, 32 * width)  # the shape of what the decoder makes
            )
            .latent_dist.mode()
        )
    assert pixels.shape == target.shape
    assert abs(pixels.mean() / config.scaling_factor + config.shift_factor) < 100
    # The same from images given as they come, row by row
    streamed = prepare_decoder_dataset(dataset.to_iterable_dataset(), *arguments)
    for name, value in next(iter(streamed)).items():
        assert list(value) == row[name]


@pytest.mark.parametrize("name", ["scaling_factor", "shift_factor", "weights", "patch normalisation"])
def test_what_was_prepared_before_is_taken_again_only_if_all_is_the_same(encoders, tmp_path, name, monkeypatch):
    Dataset.from_dict({"image": [picture()]}).cast_column("image", Image()).save_to_disk(tmp_path)
    vae = copy.deepcopy(encoders["vae"])
    image_processor = copy.deepcopy(encoders["processing_class"].image_processor)

    def prepare():
        return prepare_decoder_dataset(load_from_disk(tmp_path), encoders["model"], image_processor, vae)

    first = prepare()
    with monkeypatch.context() as patch:
        patch.setattr(vae, "encode", None)  # taken from the cache, so that nobody calls it
        assert prepare()[0] == first[0]
    if name == "weights":
        with torch.no_grad():
            vae.encoder.conv_in.bias[0] += 1
    elif name == "patch normalisation":
        image_processor.image_mean = [0.1, 0.2, 0.3]
    else:
        vae.register_to_config(**{name: 0.5})
    assert prepare()[0] != first[0]


def test_an_autoencoder_may_have_no_shift(encoders):
    vae = copy.deepcopy(encoders["vae"])
    dataset = Dataset.from_dict({"image": [picture()]}).cast_column("image", Image())
    latents = []
    for shift in (None, 0.0):
        vae.register_to_config(shift_factor=shift)
        arguments = (encoders["model"], encoders["processing_class"].image_processor, vae)
        latents.append(prepare_decoder_dataset(dataset, *arguments)[0]["latents"])
    assert latents[0] == latents[1]


def test_trains_a_converted_pipeline_from_images(encoders, converted_dir, tmp_path):
    pipe = LLaDAUniPipeline.from_pretrained(converted_dir)
    dataset = Dataset.from_dict({"image": [picture(), picture((64, 96))]}).cast_column("image", Image())
    trainer = LLaDAUniDecoderTrainer(
        pipe.transformer,
        pipe.semantic_embedder,
        LLaDAUniDecoderConfig(str(tmp_path), max_steps=1, **RUN),
        train_dataset=dataset,
        **encoders,
    )
    trainer.train()
    trainer.save_model()
    saved = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert saved == ["semantic_embedder", "transformer"]
    trainer.create_model_card()
    assert "LLaDAUniDecoderTrainer" in (tmp_path / "README.md").read_text()


# Bad input


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"stage": "alignment"}, "stage"),
        ({"trained_parts": ["vae"]}, "trained_parts"),
        ({"trained_parts": []}, "trained_parts"),
        ({"condition_dropout": 1.2}, "condition_dropout"),
        ({"timestep_sampling": "cosine"}, "timestep_sampling"),
        ({"logit_std": 0.0}, "logit_std"),
        ({"timestep_shift": 0.0}, "timestep_shift"),
        ({"ema_decay": 2.0}, "ema_decay"),
    ],
)
def test_bad_settings_are_refused(settings, name, tmp_path):
    with pytest.raises(ValueError, match=f"`{name}`"):
        LLaDAUniDecoderConfig(str(tmp_path), **settings)


def test_bad_arguments_are_refused(tmp_path):
    transformer, semantic_embedder = make_components()
    args = LLaDAUniDecoderConfig(str(tmp_path), **RUN)
    pictures = Dataset.from_dict({"image": [picture()]})
    with pytest.raises(ValueError, match="`model`, `processing_class`, `vae`"):
        LLaDAUniDecoderTrainer(transformer, semantic_embedder, args, train_dataset=pictures)
    with pytest.raises(TypeError, match="`transformer`"):
        LLaDAUniDecoderTrainer(semantic_embedder, semantic_embedder, args, train_dataset=dataset_of_images(2))
    with pytest.raises(ValueError, match="`semantic_embedder`"):
        LLaDAUniDecoderTrainer(transformer, type(semantic_embedder)(8, 24), args, train_dataset=dataset_of_images(2))
    texts = Dataset.from_dict({"text": ["a"]})
    with pytest.raises(ValueError, match="`dataset` must have a column `image`"):
        prepare_decoder_dataset(texts, None, None, None)
    for name in ("train_dataset", "eval_dataset"):
        data = {"train_dataset": dataset_of_images(2), name: texts}
        with pytest.raises(ValueError, match=f"`{name}` must have a column `image`"):
            LLaDAUniDecoderTrainer(transformer, semantic_embedder, args, **data)
