"""Training of the diffusion decoder: flow matching on pairs of image codes and images."""

from typing import Any

import torch
from datasets import Dataset, IterableDataset
from diffusers.models import AutoencoderKL, ZImageTransformer2DModel
from diffusers.models.modeling_utils import ModelMixin
from diffusers.training_utils import compute_density_for_timestep_sampling

from transformers_llada_uni import LLaDAUniForConditionalGeneration, LLaDAUniProcessor
from transformers_llada_uni.training.base_trainer import check_settings
from transformers_llada_uni.training.data.dataset_loading import AnyDataset
from transformers_llada_uni.training.objective.noise import step_generators
from transformers_llada_uni.training.stages import freeze_all_but

from ..semantic_embedder import LLaDAUniSemanticEmbedder
from .component_trainer import ComponentTrainer
from .decoder_config import LLaDAUniDecoderConfig
from .decoder_data import check_codes, collate, is_prepared, prepare_decoder_dataset
from .decoder_model import DecoderModule
from .decoder_stages import DECODER_PARTS, DECODER_STAGES
from .flow_matching import noised, squared_errors, velocities_to


class LLaDAUniDecoderTrainer(ComponentTrainer[DecoderModule]):
    r"""
    transformers' [`~transformers.Trainer`] for the decoder. With latents x of an image, noise e and a noise level
    sigma, the decoder sees (1 - sigma) x + sigma e at time 1 - sigma and learns the velocity toward data:

        L = mean over images of  mean | v(x_sigma, 1 - sigma, codes) - (x - e) |^2     (arXiv 2210.02747)

    Saved are the folders `transformer/` and `semantic_embedder/` of a pipeline.

    Args:
        transformer ([`~diffusers.ZImageTransformer2DModel`]), semantic_embedder ([`LLaDAUniSemanticEmbedder`]): What
            is trained, as far as `args.stage` trains it.
        args ([`LLaDAUniDecoderConfig`], *optional*): Settings.
        train_dataset, eval_dataset: Prepared by [`prepare_decoder_dataset`], or rows with an `image`, for which
            `model`, `processing_class` and `vae` are needed.
        model, processing_class, vae (*optional*): [`LLaDAUniForConditionalGeneration`], [`LLaDAUniProcessor`] and
            [`~diffusers.AutoencoderKL`], see above.
        **kwargs: Further arguments of [`~transformers.Trainer`].

    Raises:
        TypeError, ValueError: for components or data that do not fit.
    """

    _stage = "training of the decoder"
    args: LLaDAUniDecoderConfig

    @classmethod
    def check_columns(cls, argument: str, dataset: AnyDataset) -> None:
        is_prepared(argument, dataset)

    def __init__(
        self,
        transformer: ZImageTransformer2DModel,
        semantic_embedder: LLaDAUniSemanticEmbedder,
        args: LLaDAUniDecoderConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | None = None,
        model: LLaDAUniForConditionalGeneration | None = None,
        processing_class: LLaDAUniProcessor | None = None,
        vae: AutoencoderKL | None = None,
        **kwargs: Any,
    ):
        args = check_settings(args, LLaDAUniDecoderConfig, "llada-uni-decoder")
        self._check_datasets(train_dataset, eval_dataset)
        decoder = DecoderModule(transformer, semantic_embedder)
        freeze_all_but(decoder, args.trained_parts or DECODER_STAGES[args.stage].trained_parts, DECODER_PARTS)

        def prepare(name: str, dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
            if is_prepared(name, dataset):
                check_codes(name, dataset, semantic_embedder.config["codebook_size"])
                return dataset
            if model is None or processing_class is None or vae is None:
                encoders = {"model": model, "processing_class": processing_class, "vae": vae}
                missing = ", ".join(f"`{encoder}`" for encoder, value in encoders.items() if value is None)
                raise ValueError(f"`{name}` holds images, which need {missing}.")
            return prepare_decoder_dataset(dataset, model, processing_class.image_processor, vae)

        super().__init__(
            decoder,
            args,
            train_dataset=prepare("train_dataset", train_dataset),
            eval_dataset=None if eval_dataset is None else prepare("eval_dataset", eval_dataset),
            data_collator=collate,
            **kwargs,
        )

    # Loss

    def draw(self, latents: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
        """
        Of each image the noise level sigma `(batch,)`, the noise in the shape of its latents, and whether its codes
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

    def loss(self, model: DecoderModule, inputs: dict[str, Any]) -> torch.Tensor:
        latents = inputs["latents"]
        sigmas, noises, is_conditional = self.draw(latents)
        velocities = model(noised(latents, noises, sigmas), 1 - sigmas, inputs["codes"], is_conditional)
        return squared_errors(velocities, velocities_to(latents, noises)).mean()

    def components(self) -> dict[str, ModelMixin]:
        decoder = self.trained_model()
        return {"transformer": decoder.transformer, "semantic_embedder": decoder.semantic_embedder}
