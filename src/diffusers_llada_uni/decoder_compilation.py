"""A decoder that is faster after a first image that takes longer: fused by `torch.compile`, in float8 if wanted."""

from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel, ZSingleStreamAttnProcessor
from diffusers.quantizers import DiffusersAutoQuantizer


# The linear layers of the main blocks, but for the small ones that see the time.
PRODUCTS = r"re:layers\.\d+\.(attention\.to_(q|k|v|out\.0)|feed_forward\.w[123])"


class RealRotaryAttnProcessor(ZSingleStreamAttnProcessor):
    """diffusers' attention of the decoder, but rotated in real numbers: inductor does not fuse complex ones."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        freqs_cis: torch.Tensor | None = None,
    ) -> torch.Tensor:
        query, key, value = (
            projection(hidden_states).unflatten(-1, (attn.heads, -1))
            for projection in (attn.to_q, attn.to_k, attn.to_v)
        )
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        if freqs_cis is not None:
            rotation = torch.view_as_real(freqs_cis).unsqueeze(2)  # (batch, length, 1 head, pairs, 2)
            query, key = rotate(query, rotation), rotate(key, rotation)
        attended = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=None if attention_mask is None else attention_mask[:, None, None, :],
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        return attn.to_out[0](attended.flatten(2, 3))


def rotate(heads: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Turns neighbouring channels of `heads` `(..., channels)` by `rotation` `(..., channels / 2, 2)`: cos and sin."""
    first, second = heads.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotation.unbind(-1)
    turned = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1)
    return turned.flatten(-2).type_as(heads)


def compile_decoder(transformer: ZImageTransformer2DModel, **kwargs: Any) -> None:
    r"""
    Compiles the main blocks, each by itself: they share what is compiled, and so do images of all sizes. diffusers'
    `compile_repeated_blocks` compiles the refiners too, which are a thirtieth of the work, and one by one for lengths,
    strides and rows: after some sizes of images it is at dynamo's limit, where `fullgraph=True` fails.

    Nothing is compiled before the first call; and anew at the first of several rows, after a LoRA, for another dtype.

    Args:
        **kwargs: Of `torch.compile`; `dynamic` is `True` by default.
    """
    for block in transformer.layers:
        attention = block.get_submodule("attention")
        assert isinstance(attention, Attention)
        processor = attention.processor
        if type(processor) is ZSingleStreamAttnProcessor:
            in_real_numbers = RealRotaryAttnProcessor()
            vars(in_real_numbers).update(vars(processor))  # the attention backend, if one was set
            attention.set_processor(in_real_numbers)
        block.compile(**{"dynamic": True, **kwargs})


def quantize_decoder(transformer: ZImageTransformer2DModel) -> None:
    r"""
    Puts the weights of the main blocks into float8 (e4m3), with a scale for each output; what they are multiplied with
    is put into float8 at every step, with a scale for each token. Half the memory, and products at up to twice the
    speed, if compiled. Not exact, and not undone; one that torchao has quantised already is left as it is. It can be
    saved, and what is saved needs torchao to be loaded.

    Args:
        transformer ([`ZImageTransformer2DModel`]): In bfloat16.

    Raises:
        ImportError: without torchao.
        ValueError: if the weights are not in bfloat16, or the hardware has no products in float8; nothing has been
            changed then.
    """
    from diffusers.quantizers.quantization_config import TorchAoConfig
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, FqnToConfig, PerRow, quantize_
    from torchao.utils import TorchAOBaseTensor

    if any(isinstance(parameter.data, TorchAOBaseTensor) for parameter in transformer.parameters()):
        return
    if transformer.dtype != torch.bfloat16:
        raise ValueError(f"`float8` needs a decoder in torch.bfloat16, this one is in {transformer.dtype}.")
    float8 = Float8DynamicActivationFloat8WeightConfig(
        granularity=PerRow(),
        activation_value_lb=1e-12,  # without it a token of zeros, as padding may be, is divided by zero
        set_inductor_config=False,  # it would change how everything else in this process is compiled
    )
    config = TorchAoConfig(FqnToConfig({PRODUCTS: float8}))
    try:
        quantize_(transformer, config.quant_type, filter_fn=None)
    except AssertionError as error:
        raise ValueError(f"`float8` is not for this machine: {error}") from error
    # As diffusers leaves a decoder that it puts into float8 while loading: it can be saved, and loaded again.
    quantizer = DiffusersAutoQuantizer.from_config(config)
    quantizer.validate_environment()
    transformer.hf_quantizer = quantizer
    transformer.register_to_config(quantization_config=config)
