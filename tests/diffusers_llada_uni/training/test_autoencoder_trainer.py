"""The autoencoder's training: the formula, that images come back, and the scale of what is saved."""

import pytest
import torch
from datasets import Dataset, Image
from diffusers import AutoencoderKL
from PIL import Image as PILImage

from diffusers_llada_uni.training import LLaDAUniAutoencoderConfig, LLaDAUniAutoencoderTrainer
from transformers_llada_uni import LLaDAUniImageProcessor
from transformers_llada_uni.training.objective.noise import step_generators


SIDE = 16  # twice what the image processor gives


def make_vae():
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def pictures(num_rows=16):
    """Plain colours."""
    generator = torch.Generator().manual_seed(0)
    colours = torch.randint(0, 256, (num_rows, 3), generator=generator).tolist()
    images = [PILImage.new("RGB", (SIDE, SIDE), tuple(colour)) for colour in colours]
    return Dataset.from_dict({"image": images}).cast_column("image", Image())


def make_trainer(output_dir, dataset=None, **settings):
    run = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 10}
    run |= {"per_device_train_batch_size": 8, **settings}
    return LLaDAUniAutoencoderTrainer(
        make_vae(),
        LLaDAUniAutoencoderConfig(str(output_dir), **run),
        train_dataset=pictures() if dataset is None else dataset,
        image_processor=LLaDAUniImageProcessor(
            patch_size=4, size_multiple=8, min_pixels=64, max_pixels=64, editing_max_pixels=64
        ),
    )


def test_loss_equals_the_formula(tmp_path):
    trainer = make_trainer(tmp_path, kl_weight=0.5, absolute_error_weight=2.0, squared_error_weight=3.0)
    inputs = next(iter(trainer.get_train_dataloader()))
    assert inputs["pixels"].shape == (8, 3, SIDE, SIDE)
    assert -1 <= inputs["pixels"].min() < 0 < inputs["pixels"].max() <= 1
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, inputs)
        trainer.callback_handler.call_event("on_step_begin", trainer.args, trainer.state, trainer.control)
        noise = torch.stack([torch.randn(4, 8, 8, generator=one) for one in step_generators(trainer, 8)])
        vae = trainer.model.vae
        mean, log_variance = vae.encoder(inputs["pixels"]).chunk(2, dim=1)
        found = vae.decoder(mean + (0.5 * log_variance).exp() * noise)
        error = found - inputs["pixels"]
        divergence = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(dim=(1, 2, 3))
        expected = 2 * error.abs().mean() + 3 * (error**2).mean() + 0.5 * divergence.mean()
    torch.testing.assert_close(loss, expected)


def test_images_come_back_and_latents_have_the_scale_that_is_saved(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=150, learning_rate=5e-3, lr_scheduler_type="cosine")
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.3 * losses[0]
    trainer.save_model(tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["vae"]
    vae = AutoencoderKL.from_pretrained(tmp_path / "vae")
    pixels = torch.cat([batch["pixels"] for batch in trainer.get_eval_dataloader(pictures())])
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.mode()
        error = (vae.decode(latents).sample - pixels).abs().mean()
    assert error < 0.15
    scaled = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    assert scaled.mean().item() == pytest.approx(0, abs=1e-3)
    assert scaled.std().item() == pytest.approx(1, abs=1e-2)


def test_bad_input_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`train_dataset` must have a column `image`"):
        make_trainer(tmp_path, dataset=Dataset.from_dict({"picture": [1]}))
    with pytest.raises(ValueError, match="`kl_weight`.*-1"):
        LLaDAUniAutoencoderConfig(str(tmp_path), kl_weight=-1)
    with pytest.raises(ValueError, match="`absolute_error_weight` and `squared_error_weight`"):
        LLaDAUniAutoencoderConfig(str(tmp_path), absolute_error_weight=0, squared_error_weight=0)
    with pytest.raises(TypeError, match="`image_processor`"):
        LLaDAUniAutoencoderTrainer(make_vae(), train_dataset=pictures(), image_processor=None)
