"""
Weights in eight-bit floats with a scale for each block beside them, as DeepSeek-V3 stores them
(https://huggingface.co/deepseek-ai/DeepSeek-V3, README_WEIGHTS.md) and, by what others report of it, the FP8 release:
`X.weight` is float8_e4m3, `X.weight_scale_inv` the factors to multiply its blocks by, and `quantization_config` in
config.json says how large a block is. Conversion copies both; transformers computes with them or dequantises them.
"""

import re
from collections.abc import Mapping
from math import ceil
from pathlib import Path
from typing import Any

import torch

from llada_uni.conversion.llada_uni_layout import (
    IMAGE_TOKENIZER_PREFIXES,
    SCALE_SUFFIX,
    Shapes,
    backbone_name_to_ours,
    backbone_name_to_released,
)
from llada_uni.conversion.tensor_files import TensorRef


def check_quantization_config(config: Mapping[str, Any], backbone: Mapping[str, TensorRef], file: Path) -> None:
    """
    Args:
        config: The content of `file`, a config.json.
        backbone: The backbone's tensors.

    Raises:
        ValueError: if the weights are of a kind that this converter does not copy, or config and weights disagree.
    """
    quantization = config.get("quantization_config")
    if quantization is None:
        if any(ref.dtype.itemsize == 1 for ref in backbone.values()):
            raise ValueError(f"{file} has no `quantization_config`, but some weights have eight bits.")
        return
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
    if method != "fp8":
        raise ValueError(
            f"{file} has the `quant_method` {method!r} in `quantization_config`; only 'fp8' is converted."
        )
    block = quantization.get("weight_block_size")
    if not (isinstance(block, list) and len(block) == 2 and all(isinstance(size, int) and size > 0 for size in block)):
        raise ValueError(f"{file}: `weight_block_size` should be two sizes, like [128, 128], got {block!r}.")
    if not any(ref.dtype == torch.float8_e4m3fn for ref in backbone.values()):
        raise ValueError(f"{file} has a `quantization_config`, but no weight is float8_e4m3.")


def scale_shapes(backbone: Mapping[str, TensorRef], config: Mapping[str, Any]) -> Shapes:
    """Names and shapes of the scales that the FP8 weights among these tensors need."""
    quantization = config.get("quantization_config")
    if quantization is None:
        return {}
    rows, columns = quantization["weight_block_size"]
    return {
        name + SCALE_SUFFIX: (ceil(ref.shape[0] / rows), ceil(ref.shape[1] / columns))
        for name, ref in backbone.items()
        if ref.dtype == torch.float8_e4m3fn and len(ref.shape) == 2
    }


def quantization_config_to_ours(quantization: Mapping[str, Any], backbone: Mapping[str, TensorRef]) -> dict[str, Any]:
    """Which modules are not quantised, the tensors say; the image tokenizer, which we store beside them, is not."""
    whole = {
        re.sub(r"(\.mlp\.experts)\..*", r"\1", backbone_name_to_ours(name).removesuffix(".weight"))
        for name, ref in backbone.items()
        if len(ref.shape) == 2 and ref.dtype != torch.float8_e4m3fn and not name.endswith(SCALE_SUFFIX)
    }
    image_tokenizer = [prefix.removesuffix(".") for prefix in IMAGE_TOKENIZER_PREFIXES]
    return {**quantization, "modules_to_not_convert": [*image_tokenizer, *sorted(whole)]}


def quantization_config_to_released(quantization: Mapping[str, Any]) -> dict[str, Any]:
    names = quantization.get("modules_to_not_convert") or []
    of_backbone = [name for name in names if not f"{name}.".startswith(IMAGE_TOKENIZER_PREFIXES)]
    return {**quantization, "modules_to_not_convert": [backbone_name_to_released(name) for name in of_backbone]}
