"""The decoder as the steps of one decoding call it: as many rows at a time as pay, their condition computed once."""

from typing import Any

import torch
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
from diffusers.utils.torch_utils import is_compiled_module

from .decoder_condition import forget_condition, with_remembered_condition
from .fused_norms import with_fused_norms
from .module_sharing import is_hooked, is_replaced


# Features and patches of latents that the decoder takes at once: those of two rows of 1024 x 1024 pixels, which are an
# image and its unguided half. A GPU is busy with less; more would only take memory.
MAX_TOKENS = 16_384


class SteppedDecoder:
    r"""
    Called as `ZImageTransformer2DModel` is, at every step of one decoding with the same features.

    It takes as many rows at a time as have [`MAX_TOKENS`] tokens, at least one, and computes their condition at their
    first step only. What it remembers is in copies that share the decoder's weights: to other threads and pipelines,
    and to callbacks, the decoder is as it was.

    Args:
        transformer ([`ZImageTransformer2DModel`]): The decoder. One that is compiled as a whole, is under hooks of
            diffusers or has a `forward` of its own does all its work at every step, as they may count on it.
    """

    def __init__(self, transformer: ZImageTransformer2DModel) -> None:
        self.config, self.dtype = transformer.config, transformer.dtype
        self._transformer = transformer
        self._copies: dict[int, ZImageTransformer2DModel] = {}  # by the first row that they take
        self._num_rows: int | None = None

    def __call__(
        self, latents: list[torch.Tensor], time: torch.Tensor, features: list[torch.Tensor], **kwargs: Any
    ) -> tuple[list[torch.Tensor]]:
        r"""
        Args:
            latents (list of `torch.Tensor` of shape `(channels, frames, h, w)`): Of each row.
            time (`torch.Tensor` of shape `(rows,)`): 0 is noise, 1 data.
            features (list of `torch.Tensor` of shape `(patches, cap_feat_dim)`): Of each row.
            **kwargs: Of the decoder; with `return_dict=False`.

        Returns:
            A tuple of one list, of each row the velocity toward data, as `latents`.
        """
        if len(latents) != self._num_rows:  # guidance was turned on or off between steps
            self._num_rows = len(latents)
            self.forget_condition()
        rows_at_once = max(1, MAX_TOKENS // (2 * len(features[0])))
        velocities: list[torch.Tensor] = []
        for first in range(0, len(latents), rows_at_once):
            if first not in self._copies:
                self._copies[first] = self._copy(features[0].device)
            decoder, rows = self._copies[first], slice(first, first + rows_at_once)
            velocities += decoder(latents[rows], time[rows], features[rows], **kwargs)[0]
        return (velocities,)

    def forget_condition(self) -> None:
        """The next step computes the condition anew: the features may have changed."""
        for decoder in self._copies.values():
            forget_condition(decoder)

    def _copy(self, device: torch.device) -> ZImageTransformer2DModel:
        transformer = self._transformer
        is_compiled = is_compiled_module(transformer) or transformer._compiled_call_impl is not None
        if is_compiled or is_hooked(transformer) or is_replaced(transformer):
            return transformer
        copied = with_fused_norms(transformer) if device.type == "cuda" else transformer
        return with_remembered_condition(copied)
