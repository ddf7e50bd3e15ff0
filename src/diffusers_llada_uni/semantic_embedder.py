"""The SigVQ embedder: image codes of the language model -> the features that condition the diffusion decoder."""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import FeedForward
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin  # diffusers looks for the base class in this module
from torch import nn


class LLaDAUniSemanticEmbedder(ModelMixin, ConfigMixin):  # type: ignore[misc]  # as all models of diffusers
    r"""
    Codebook embedding followed by Linear, SiLU, Linear (the release's `image_tokenizer/sigvq_embedding.pt`).

    State dict, with the released names: `prior_token_embedding.weight` (codebook_size, embedding_dim),
    `prior_projector.net.0.proj.{weight,bias}` (hidden_dim, embedding_dim) and `prior_projector.net.2.{weight,bias}`
    (out_dim, hidden_dim).

    Args:
        codebook_size (`int`, defaults to 16384): Number of image codes.
        embedding_dim (`int`, defaults to 4096): Width of the codebook embedding.
        hidden_dim (`int`, *optional*): Width between the two linear layers; `embedding_dim` by default.
        out_dim (`int`, *optional*): Width of the features, the decoder's `cap_feat_dim`; `embedding_dim` by default.
    """

    _supports_gradient_checkpointing = False
    _no_split_modules = ["FeedForward"]  # type: ignore[assignment]  # diffusers' default is None

    @register_to_config
    def __init__(
        self,
        codebook_size: int = 16384,
        embedding_dim: int = 4096,
        hidden_dim: int | None = None,
        out_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.prior_token_embedding = nn.Embedding(codebook_size, embedding_dim)
        self.prior_projector = FeedForward(
            embedding_dim,
            dim_out=out_dim,
            inner_dim=embedding_dim if hidden_dim is None else hidden_dim,
            activation_fn="linear-silu",
        )

    def forward(
        self, codes: torch.Tensor, upscale: int = 2, return_dict: bool = True
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        r"""
        Args:
            codes (`torch.LongTensor` of shape `(batch, H, W)`): Image codes, 0..codebook_size-1.
            upscale (`int`, defaults to 2): How many times each code is repeated down and across (nearest-neighbour
                upsampling of the grid).
            return_dict (`bool`, defaults to `True`): Return an output with the field `sample`, else a tuple.

        Returns:
            `sample`, a `torch.Tensor` of shape `(batch, upscale * H * upscale * W, out_dim)`: features in raster
            order.

        Raises:
            ValueError: if `codes` is not a batch of grids of integers, or `upscale` is less than 1.
        """
        if codes.ndim != 3 or codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
            raise ValueError(
                "`codes` must be an integer tensor of shape (batch, H, W), got "
                f"{codes.dtype} of shape {tuple(codes.shape)}."
            )
        if upscale < 1:
            raise ValueError(f"`upscale` must be at least 1, got {upscale}.")
        # The embedder looks at each code alone, so upsampling its output is the same and `upscale` squared cheaper.
        features = self.prior_projector(self.prior_token_embedding(codes))  # (batch, H, W, out_dim)
        features = features.repeat_interleave(upscale, dim=1).repeat_interleave(upscale, dim=2)
        features = features.flatten(1, 2)
        return Transformer2DModelOutput(sample=features) if return_dict else (features,)
