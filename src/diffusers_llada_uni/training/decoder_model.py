"""What the decoder's trainers train: the embedder of image codes and the transformer behind it, as one module."""

import torch
from diffusers.models import ZImageTransformer2DModel

from transformers_llada_uni.image_sizes import UPSCALE
from transformers_llada_uni.training.base_trainer import check_class

from ..semantic_embedder import LLaDAUniSemanticEmbedder
from .component_trainer import ComponentModule


class DecoderModule(ComponentModule):
    """
    Velocity toward data of noisy latents, given image codes.

    Args:
        transformer ([`~diffusers.ZImageTransformer2DModel`]): The decoder.
        semantic_embedder ([`LLaDAUniSemanticEmbedder`]): Codes to features.

    Raises:
        TypeError: if a component is of another class. ValueError: if they do not fit each other.
    """

    def __init__(self, transformer: ZImageTransformer2DModel, semantic_embedder: LLaDAUniSemanticEmbedder):
        super().__init__()
        check_class("transformer", transformer, ZImageTransformer2DModel)
        check_class("semantic_embedder", semantic_embedder, LLaDAUniSemanticEmbedder)
        width = semantic_embedder.config["out_dim"] or semantic_embedder.config["embedding_dim"]
        if width != transformer.config["cap_feat_dim"]:
            raise ValueError(
                f"`semantic_embedder` makes features of width {width}, `transformer` takes "
                f"{transformer.config['cap_feat_dim']}: they are not of the same checkpoint."
            )
        self.transformer = transformer
        self.semantic_embedder = semantic_embedder

    def forward(
        self,
        latents: list[torch.Tensor],
        time: torch.Tensor,
        codes: list[torch.Tensor],
        is_conditional: torch.Tensor,
    ) -> list[torch.Tensor]:
        """
        Args:
            latents: Noisy latents, each `(channels, 4 * H, 4 * W)`; sizes may differ.
            time: `(batch,)`, 0 for noise to 1 for data.
            codes: Image codes, each `(H, W)`.
            is_conditional: `(batch,)`; where false, the features are zero, as in guidance.

        Returns:
            Velocities in the shapes of `latents`, float32.
        """
        dtype = self.transformer.dtype
        features = []
        for grid, keeps in zip(codes, is_conditional.tolist(), strict=True):
            feature = self.semantic_embedder(grid[None], UPSCALE).sample[0]
            features.append((feature if keeps else feature * 0).to(dtype))
        config = self.transformer.config
        outputs = self.transformer(
            [latent.to(dtype).unsqueeze(1) for latent in latents],  # one frame
            time.to(dtype),
            features,
            patch_size=config["all_patch_size"][0],
            f_patch_size=config["all_f_patch_size"][0],
            return_dict=False,
        )[0]
        return [output.squeeze(1).float() for output in outputs]
