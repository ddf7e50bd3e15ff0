"""Grouped-query attention under a mask that reads the keys and values where they are."""

import torch
import torch.nn.functional as F
from torch import nn


def can_share_key_value_heads(
    attention_implementation: str | None, query_states: torch.Tensor, attention_mask: object | None
) -> bool:
    """
    Whether [`shared_key_value_attention_forward`] may stand in for transformers' sdpa.

    Under a mask transformers repeats keys and values for every query head: a copy of the whole cache, several times
    its size, in every layer of every step. On CPU the kernel itself shares the heads, with a mask as without, and
    computes the same bits; other devices would fall back to a slow kernel, so there transformers chooses.
    """
    return attention_implementation == "sdpa" and attention_mask is not None and query_states.device.type == "cpu"


def shared_key_value_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    transformers' attention interface; every key and value head serves the query heads of its group.

    Args:
        query: `(batch, heads, length, head_dim)`.
        key, value: `(batch, key_value_heads, past + length, head_dim)`, may be views of a larger buffer.
        attention_mask: `(batch, 1, length, past + length)`, boolean or added to the scores.

    Returns:
        `(batch, length, heads, head_dim)`, and no weights.
    """
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling, enable_gqa=True
    )
    return output.transpose(1, 2).contiguous(), None
