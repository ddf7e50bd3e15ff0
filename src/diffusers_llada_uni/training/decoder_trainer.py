"""Training of the diffusion decoder: flow matching on pairs of image codes and pictures."""

from typing import Any

import torch
from datasets import Dataset, IterableDataset
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from diffusers.training_utils import compute_density_for_timestep_sampling
from transformers import PreTrainedModel, Trainer

from transformers_llada_uni import LLaDAUniProcessor
from transformers_llada_uni.training.checkpointing import ResumableTrainerMixin
from transformers_llada_uni.training.model_card import TrainingCardMixin
from transformers_llada_uni.training.objective.noise import step_generators

from ..semantic_embedder import LLaDAUniSemanticEmbedder
from .component_saving import ComponentSavingMixin
from .decoder_config import LLaDAUniDecoderConfig
from .decoder_data import COLUMNS, collate, prepare_decoder_dataset
from .decoder_model import CodeDecoder


class LLaDAUniDecoderTrainer(TrainingCardMixin, ComponentSavingMixin, ResumableTrainerMixin, Trainer):
    r"""
    transformers' [`~transformers.Trainer`] for the decoder. With latents x of a picture, noise e and a noise level
    sigma, the decoder sees (1 - sigma) x + sigma e at time 1 - sigma and learns the velocity toward data:

        L = mean over pictures of  mean | v(x_sigma, 1 - sigma, codes) - (x - e) |^2     (arXiv 2210.02747)

    Saved are the folders `transformer/` and `semantic_embedder/` of a pipeline.

    Args:
        transformer ([`~diffusers.ZImageTransformer2DModel`]), semantic_embedder ([`LLaDAUniSemanticEmbedder`]): What
            is trained.
        args ([`LLaDAUniDecoderConfig`], *optional*): Settings.
        train_dataset, eval_dataset: Prepared by [`prepare_decoder_dataset`], or rows with an `image`, for which
            `model`, `processing_class` and `vae` are needed.
        model ([`LLaDAUniForConditionalGeneration`]), processing_class ([`LLaDAUniProcessor`]), vae
            ([`~diffusers.AutoencoderKL`]): *Optional*, see above.
        **kwargs: Further arguments of [`~transformers.Trainer`].

    Raises:
        TypeError, ValueError: for components or data that do not fit.
    """

    _stage = "training of the decoder"

    def __init__(
        self,
        transformer: ZImageTransformer2DModel,
        semantic_embedder: LLaDAUniSemanticEmbedder,
        args: LLaDAUniDecoderConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | None = None,
        model: PreTrainedModel | None = None,
        processing_class: LLaDAUniProcessor | None = None,
        vae: AutoencoderKL | None = None,
        **kwargs: Any,
    ):
        args = LLaDAUniDecoderConfig("llada-uni-decoder") if args is None else args
        if not isinstance(args, LLaDAUniDecoderConfig):
            raise TypeError(f"`args` must be a LLaDAUniDecoderConfig, got {type(args).__name__}.")
        if not train_dataset:
            raise ValueError(f"`train_dataset` must hold pictures to train on, got {train_dataset!r}.")
        self._encoders = {"model": model, "processing_class": processing_class, "vae": vae}
        decoder = CodeDecoder(transformer, semantic_embedder)
        semantic_embedder.requires_grad_(args.train_semantic_embedder)
        super().__init__(
            model=decoder,
            args=args,
            train_dataset=self._prepare(train_dataset),
            eval_dataset=None if eval_dataset is None else self._prepare(eval_dataset),
            data_collator=collate,
            **kwargs,
        )
        self.average_weights(args.ema_decay)

    def _prepare(self, dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
        if set(COLUMNS) <= set(dataset.column_names or []):
            return dataset
        missing = [name for name, value in self._encoders.items() if value is None]
        if missing:
            raise ValueError(
                f"`train_dataset` holds pictures, which need {', '.join(f'`{name}`' for name in missing)}."
            )
        image_processor = self._encoders["processing_class"].image_processor
        return prepare_decoder_dataset(dataset, self._encoders["model"], image_processor, self._encoders["vae"])

    # Loss

    def draw(self, latents: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor], torch.BoolTensor]:
        """
        Of each picture the noise level sigma `(batch,)`, the noise in the shape of its latents, and whether its codes
        are shown `(batch,)`.
        """
        args, device = self.args, latents[0].device
        sigmas, noises, is_conditional = [], [], []
        scheme = {"uniform": "none", "logit_normal": "logit_normal"}[args.timestep_sampling]
        for latent, generator in zip(latents, step_generators(self, len(latents)), strict=True):
            sigma = compute_density_for_timestep_sampling(
                scheme, 1, logit_mean=args.logit_mean, logit_std=args.logit_std, generator=generator
            )
            sigmas.append(args.timestep_shift * sigma / (1 + (args.timestep_shift - 1) * sigma))
            is_conditional.append(torch.rand(1, generator=generator) >= args.condition_dropout)
            noises.append(torch.randn(latent.shape, generator=generator).to(device))
        return torch.cat(sigmas).to(device), noises, torch.cat(is_conditional).to(device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        latents = inputs["latents"]
        sigmas, noises, is_conditional = self.draw(latents)
        noisy = [
            (1 - sigma) * latent + sigma * noise for sigma, latent, noise in zip(sigmas, latents, noises, strict=True)
        ]
        velocities = model(noisy, 1 - sigmas, inputs["codes"], is_conditional)
        errors = [
            (velocity - (latent - noise)).square().mean()
            for velocity, latent, noise in zip(velocities, latents, noises, strict=True)
        ]
        loss = torch.stack(errors).mean()
        return (loss, {}) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    def components(self) -> dict[str, torch.nn.Module]:
        decoder = self.trained_model()
        return {"transformer": decoder.transformer, "semantic_embedder": decoder.semantic_embedder}


__all__ = ["LLaDAUniDecoderTrainer"]
