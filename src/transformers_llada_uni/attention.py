"""The attention half of a layer, the norm that both halves begin with, and states of some positions only."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.glm4_moe.modeling_glm4_moe import (
    Glm4MoeRMSNorm,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .configuration_llada2_moe import LLaDA2MoeConfig
from .document_attention import PackedDocuments, attention_within_documents
from .kernels import can_fuse
from .masking_block_causal import PrefixMask


def take_positions(states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """
    Of states `(batch, ..., length, width)`, where the batch may be 1 for all rows, the positions of each row,
    `(batch, kept)`: `(batch, ..., kept, width)`.
    """
    rows, num_kept = positions.shape
    index = positions.view(rows, *[1] * (states.ndim - 3), num_kept, 1)
    # Not `take_along_dim`: its broadcasting would tie a compiled graph to the length of the prefix.
    index = index.expand(-1, *states.shape[1:-2], -1, states.shape[-1])
    return states.expand(rows, *states.shape[1:]).gather(-2, index)


class LLaDA2MoeRMSNorm(Glm4MoeRMSNorm):
    """With the addition to the residual stream that goes before it; on a GPU without gradients one kernel."""

    def forward(  # type: ignore[override]  # with a residual two tensors
        self, hidden_states: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            hidden_states: `(..., hidden_size)`.
            residual: As `hidden_states`, added to them first.

        Returns:
            The normed states; with `residual`, these and the sum.
        """
        if can_fuse(hidden_states, self.weight):
            from .kernels.normalization import rms_norm

            return rms_norm(hidden_states, self.weight, self.variance_epsilon, residual)
        if residual is None:
            return super().forward(hidden_states)
        hidden_states = residual + hidden_states
        return super().forward(hidden_states), hidden_states


class LLaDA2MoeAttention(nn.Module):
    """Grouped-query attention with RMSNorm on query and key heads and rotary embedding on the first channels."""

    def __init__(self, config: LLaDA2MoeConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
        self.num_heads = config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads
        self.num_key_value_groups = self.num_heads // self.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = False

        self.query_key_value = nn.Linear(
            config.hidden_size, (self.num_heads + 2 * self.num_key_value_heads) * self.head_dim, bias=False
        )
        self.query_layernorm = LLaDA2MoeRMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.key_layernorm = LLaDA2MoeRMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.dense = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | BlockMask | PrefixMask | None,
        past_key_values: Cache | None = None,
        positions_to_keep: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            attention_mask: With a [`PrefixMask`] keys and values go into the static buffers of `past_key_values` and
                are attended to there.
            positions_to_keep: `(batch, kept)`, the positions that attend; all are attended to. Default: all.

        Returns:
            `(batch, kept, hidden_size)` and, where the implementation has them, the attention weights.
        """
        query_key_value = self.query_key_value(hidden_states)
        if isinstance(attention_mask, PrefixMask) and past_key_values is not None:
            layer = past_key_values.layers[self.layer_idx]
            attn_output = self._attend_to_prefix(query_key_value, position_embeddings, attention_mask, layer)
            if positions_to_keep is not None:
                attn_output = take_positions(attn_output, positions_to_keep)
            return self.dense(attn_output), None

        heads = query_key_value.view(*hidden_states.shape[:-1], -1, self.head_dim)
        query_states, key_states, value_states = heads.split(
            [self.num_heads, self.num_key_value_heads, self.num_key_value_heads], dim=-2
        )
        query_states = self.query_layernorm(query_states).transpose(1, 2)
        key_states = self.key_layernorm(key_states).transpose(1, 2)
        value_states = value_states.transpose(1, 2)

        query_states, key_states = apply_rotary_pos_emb(query_states, key_states, *position_embeddings)
        if past_key_values is not None:
            key_states, value_states = past_key_values.update(key_states, value_states, self.layer_idx)
        if positions_to_keep is not None:
            query_states = take_positions(query_states, positions_to_keep)
            if isinstance(attention_mask, torch.Tensor):
                attention_mask = take_positions(attention_mask, positions_to_keep)

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        if can_share_key_value_heads(self.config._attn_implementation, query_states, attention_mask):
            attention_interface = shared_key_value_attention_forward
        length = query_states.shape[-2]
        is_flex = self.config._attn_implementation == "flex_attention" and query_states.is_cuda
        if is_flex and length < 128 < length * self.num_key_value_groups:
            # inductor's kernel for short queries takes all of a key head's in one block, of at most 128
            options = {"FORCE_USE_FLEX_ATTENTION": True}
            kwargs.setdefault("kernel_options", options)  # type: ignore[typeddict-item]  # flex attention's own
        attn_output, attn_weights = attention_interface(
            self,
            query_states,
            key_states,
            value_states,
            attention_mask,
            dropout=0.0 if not self.training else self.attention_dropout,
            scaling=self.scaling,
            is_causal=False,
            **kwargs,
        )
        attn_output = attn_output.flatten(-2).contiguous()
        return self.dense(attn_output), attn_weights

    def _attend_to_prefix(
        self,
        query_key_value: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        mask: PrefixMask,
        layer: Any,
    ) -> torch.Tensor:
        """Norms, rotary embedding, cache and attention in two kernels (three where few programs share the keys)."""
        from .kernels.prefix_attention import prefix_attention
        from .kernels.rotary import rotate_and_store

        query = rotate_and_store(
            query_key_value,
            self.query_layernorm.weight,
            self.key_layernorm.weight,
            self.query_layernorm.variance_epsilon,
            *position_embeddings,
            layer.keys,
            layer.values,
            mask.first_column,
            self.num_heads,
            self.num_key_value_heads,
        )
        return prefix_attention(
            query, layer.keys, layer.values, mask.first_column, mask.padding, mask.block_length, self.scaling
        )


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
    documents: PackedDocuments | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    transformers' attention interface; every key and value head serves the query heads of its group.

    Args:
        query: `(batch, heads, length, head_dim)`.
        key, value: `(batch, key_value_heads, past + length, head_dim)`, may be views of a larger buffer.
        attention_mask: `(batch, 1, length, past + length)`, boolean or added to the scores.
        documents: Between which the mask is closed; each is then attended to alone.

    Returns:
        `(batch, length, heads, head_dim)`, and no weights.
    """
    if documents is not None:
        return attention_within_documents(query, key, value, documents, dropout, scaling), None
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling, enable_gqa=True
    )
    return output.transpose(1, 2).contiguous(), None
