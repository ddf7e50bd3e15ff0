"""Training of the autoencoder that the decoder draws with, for images unlike those of the released one."""

from typing import Any

import torch
from datasets import Dataset, IterableDataset
from diffusers.image_processor import VaeImageProcessor
from diffusers.models import AutoencoderKL

from transformers_llada_uni import LLaDAUniImageProcessor
from transformers_llada_uni.training.base_trainer import check_class, check_settings
from transformers_llada_uni.training.data.dataset_formats import stored_image
from transformers_llada_uni.training.objective.noise import step_generators

from .autoencoder_config import LLaDAUniAutoencoderConfig
from .component_trainer import ComponentModule, ComponentTrainer


class _Autoencoder(ComponentModule):
    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, pixels: torch.Tensor, generators: list[torch.Generator]) -> tuple[torch.Tensor, torch.Tensor]:
        """The pixels again `(batch, 3, height, width)`, and each image's divergence `(batch,)`."""
        posterior = self.vae.encode(pixels, return_dict=False)[0]
        return self.vae.decode(posterior.sample(generators), return_dict=False)[0], posterior.kl()


class _Collator:
    """Images to `pixels` `(batch, 3, height, width)`, -1..1."""

    def __init__(self, image_processor: LLaDAUniImageProcessor):
        self.image_processor = image_processor
        self.pixels_of = VaeImageProcessor(do_resize=False)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        images = [self.image_processor.fetch_images(stored_image(row["image"])) for row in rows]
        images = [self.image_processor.as_drawn(image) for image in images]
        sizes = sorted({image.size for image in images})
        if len(sizes) > 1:
            raise ValueError(
                f"`train_dataset`: a batch has images of {sizes} pixels; group them by size, or take one at a time "
                "(`per_device_train_batch_size=1`)."
            )
        return {"pixels": self.pixels_of.preprocess(images)}


class LLaDAUniAutoencoderTrainer(ComponentTrainer[_Autoencoder]):
    r"""
    transformers' [`~transformers.Trainer`] for diffusers' autoencoder (arXiv 1312.6114). With pixels x in -1..1 and
    latents z = mean + std * noise,

        L = absolute_error_weight * mean |x' - x| + squared_error_weight * mean (x' - x)^2
            + kl_weight * mean over images of KL(z | N(0, 1)).

    When it is saved, `scaling_factor` and `shift_factor` are set so that the means of the training images' latents
    have mean 0 and deviation 1 in the decoder's eyes. Saved is the folder `vae/` of a pipeline. A decoder that was
    trained on other latents has to be trained again.

    Args:
        vae ([`~diffusers.AutoencoderKL`]): What is trained.
        args ([`LLaDAUniAutoencoderConfig`], *optional*): Settings.
        train_dataset, eval_dataset: Rows with an `image`; images of a batch must come out at one size.
        image_processor ([`LLaDAUniImageProcessor`]): Its rule of editing sizes the images, at twice the resolution.
        **kwargs: Further arguments of [`~transformers.Trainer`].

    Raises:
        TypeError, ValueError: for components or data that do not fit.
    """

    _stage = "training of the autoencoder"
    _columns = ("image",)
    args: LLaDAUniAutoencoderConfig

    def __init__(
        self,
        vae: AutoencoderKL,
        args: LLaDAUniAutoencoderConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | None = None,
        *,
        image_processor: LLaDAUniImageProcessor,
        **kwargs: Any,
    ):
        args = check_settings(args, LLaDAUniAutoencoderConfig, "llada-uni-autoencoder")
        check_class("vae", vae, AutoencoderKL)
        check_class("image_processor", image_processor, LLaDAUniImageProcessor)
        self._check_datasets(train_dataset, eval_dataset)
        super().__init__(
            _Autoencoder(vae.requires_grad_(True)),
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=_Collator(image_processor),
            **kwargs,
        )

    # Loss

    def loss(self, model: _Autoencoder, inputs: dict[str, Any]) -> torch.Tensor:
        pixels, args = inputs["pixels"], self.args
        found, divergence = model(pixels, step_generators(self, len(pixels)))
        error = found - pixels
        loss = args.absolute_error_weight * error.abs().mean() + args.squared_error_weight * error.square().mean()
        return loss + args.kl_weight * divergence.mean()

    # Saving

    @torch.no_grad()
    def components(self) -> dict[str, AutoencoderKL]:
        vae = self.trained_model().vae
        total = squares = torch.zeros((), device=vae.device, dtype=torch.float64)
        count = 0
        for inputs in self.get_train_dataloader():
            latents = vae.encode(inputs["pixels"].to(vae.device, vae.dtype), return_dict=False)[0].mode().double()
            total, squares, count = total + latents.sum(), squares + latents.square().sum(), count + latents.numel()
        mean = (total / count).item()
        deviation = (squares / count - mean**2).sqrt().item()
        vae.register_to_config(scaling_factor=1 / deviation, shift_factor=mean)
        return {"vae": vae}
