"""Training of the autoencoder that the decoder draws with, for pictures unlike those of the released one."""

from typing import Any

import torch
from datasets import Dataset, IterableDataset
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from torch import nn
from transformers import Trainer

from transformers_llada_uni import LLaDAUniImageProcessor
from transformers_llada_uni.training.checkpointing import ResumableTrainerMixin
from transformers_llada_uni.training.model_card import TrainingCardMixin
from transformers_llada_uni.training.objective.noise import step_generators

from .autoencoder_config import LLaDAUniAutoencoderConfig
from .component_saving import ComponentSavingMixin
from .decoder_data import enlarged


class _Autoencoder(nn.Module):
    """The autoencoder as a module whose forward is the pass that is trained, so that it works inside DDP."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, pixels: torch.Tensor, generators: list[torch.Generator]) -> tuple[torch.Tensor, torch.Tensor]:
        """The pixels again `(batch, 3, height, width)`, and each picture's divergence `(batch,)`."""
        posterior = self.vae.encode(pixels).latent_dist
        return self.vae.decode(posterior.sample(generators)).sample, posterior.kl()


class LLaDAUniAutoencoderTrainer(TrainingCardMixin, ComponentSavingMixin, ResumableTrainerMixin, Trainer):
    r"""
    transformers' [`~transformers.Trainer`] for diffusers' autoencoder (arXiv 1312.6114). With pixels x in -1..1 and
    latents z = mean + std * noise,

        L = absolute_error_weight * mean |x' - x| + squared_error_weight * mean (x' - x)^2
            + kl_weight * mean over pictures of KL(z | N(0, 1)).

    When it is saved, `scaling_factor` and `shift_factor` are set so that the means of the training pictures' latents
    have mean 0 and deviation 1 in the decoder's eyes. Saved is the folder `vae/` of a pipeline. A decoder that was
    trained on other latents has to be trained again.

    Args:
        vae ([`~diffusers.AutoencoderKL`]): What is trained.
        args ([`LLaDAUniAutoencoderConfig`], *optional*): Settings.
        train_dataset, eval_dataset: Rows with an `image`; pictures of a batch must come out at one size.
        image_processor ([`LLaDAUniImageProcessor`]): Its rule of editing sizes the pictures, at twice the resolution.
        **kwargs: Further arguments of [`~transformers.Trainer`].

    Raises:
        TypeError, ValueError: for components or data that do not fit.
    """

    _stage = "training of the autoencoder"

    def __init__(
        self,
        vae: AutoencoderKL,
        args: LLaDAUniAutoencoderConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | None = None,
        image_processor: LLaDAUniImageProcessor | None = None,
        **kwargs: Any,
    ):
        args = LLaDAUniAutoencoderConfig("llada-uni-autoencoder") if args is None else args
        for name, value, expected in (
            ("vae", vae, AutoencoderKL),
            ("args", args, LLaDAUniAutoencoderConfig),
            ("image_processor", image_processor, LLaDAUniImageProcessor),
        ):
            if not isinstance(value, expected):
                raise TypeError(f"`{name}` must be a {expected.__name__}, got {type(value).__name__}.")
        for name, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            if dataset is None and name == "eval_dataset":
                continue
            if "image" not in (getattr(dataset, "column_names", None) or []):
                raise ValueError(f"`{name}` must have a column `image`, got {dataset!r:.80}.")
        self._image_processor = image_processor
        self._pixels_of = VaeImageProcessor(do_resize=False)
        super().__init__(
            model=_Autoencoder(vae.requires_grad_(True)),
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=self._collate,
            **kwargs,
        )
        self.average_weights(args.ema_decay)

    def _collate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        pictures = [self._image_processor.fetch_images(row["image"]) for row in rows]
        pictures = [enlarged(picture, self._image_processor) for picture in pictures]
        if len({picture.size for picture in pictures}) > 1:
            raise ValueError(
                f"`train_dataset`: a batch has pictures of {sorted({picture.size for picture in pictures})} pixels; "
                "group them by size, or take one at a time (`per_device_train_batch_size=1`)."
            )
        return {"pixels": self._pixels_of.preprocess(pictures)}

    # Loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        pixels, args = inputs["pixels"], self.args
        found, divergence = model(pixels, step_generators(self, len(pixels)))
        error = found - pixels
        loss = args.absolute_error_weight * error.abs().mean() + args.squared_error_weight * error.square().mean()
        loss = loss + args.kl_weight * divergence.mean()
        return (loss, {}) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    # Saving

    @torch.no_grad()
    def components(self) -> dict[str, AutoencoderKL]:
        vae = self.trained_model().vae
        total, squares, count = 0.0, 0.0, 0
        for inputs in self.get_train_dataloader():
            latents = vae.encode(inputs["pixels"].to(vae.device, vae.dtype)).latent_dist.mode().double()
            total, squares, count = total + latents.sum(), squares + latents.square().sum(), count + latents.numel()
        mean = (total / count).item()
        deviation = (squares / count - mean**2).sqrt().item()
        vae.register_to_config(scaling_factor=1 / deviation, shift_factor=mean)
        return {"vae": vae}


__all__ = ["LLaDAUniAutoencoderTrainer"]
