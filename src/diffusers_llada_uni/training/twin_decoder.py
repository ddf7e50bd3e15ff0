"""A decoder that learns two flows: to images of the data, and to those that it draws itself."""

from contextlib import nullcontext

import torch
from diffusers.models import ZImageTransformer2DModel
from torch import nn

from ..semantic_embedder import LLaDAUniSemanticEmbedder
from .decoder_model import DecoderModule


class TwinDecoder(DecoderModule):
    """
    TwinFlow (arXiv 2512.05150) tells its two flows apart by the sign of the time. Ours does by a vector that is added
    to the embedding of the time, zero at first, so that the second flow begins as the first. Only the training knows
    it: what is saved is the transformer as it was.
    """

    def __init__(self, transformer: ZImageTransformer2DModel, semantic_embedder: LLaDAUniSemanticEmbedder):
        super().__init__(transformer, semantic_embedder)
        self.twin = nn.Parameter(torch.zeros(transformer.t_embedder.mlp[-1].out_features))

    def forward(
        self,
        latents: list[torch.Tensor],
        time: torch.Tensor,
        codes: list[torch.Tensor],
        is_conditional: torch.Tensor,
        is_twin: bool = False,
        in_full_precision: bool = False,
    ) -> list[torch.Tensor]:
        """
        As [`DecoderModule.forward`]; with `is_twin`, velocities to the decoder's own images, and with
        `in_full_precision` without autocast, also inside that which accelerate puts around this.
        """
        # Added in any case: several processes wait for a gradient of every weight that learns.
        added = self.twin if is_twin else 0 * self.twin
        hook = self.transformer.t_embedder.register_forward_hook(
            lambda layer, inputs, output: output + added.to(output.dtype)
        )
        device_type = latents[0].device.type
        plain = torch.autocast(device_type, enabled=False) if in_full_precision else nullcontext()
        try:
            with plain:
                return super().forward(latents, time, codes, is_conditional)
        finally:
            hook.remove()
