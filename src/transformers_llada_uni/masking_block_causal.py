"""The block-causal attention mask, for every attention implementation of transformers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    find_packed_sequence_indices,
    packed_sequence_compatibility_function,
)
from transformers.utils.generic import is_flash_attention_requested
from transformers.utils.import_utils import is_tracing, torch_compilable_check


@dataclass
class PrefixMask:
    """
    The block-causal mask of a step over key/value buffers that are longer than what is written, in a form that a
    kernel goes by: where the step stands is a tensor, so a recorded step finds it anew.

    Attributes:
        first_column: `()`, the column of the first query.
        padding: `(batch,)`, columns of padding on the left.
        block_length: Tokens in a block. Blocks begin at column 0.
    """

    first_column: torch.Tensor
    padding: torch.Tensor
    block_length: int

    def dense(self, config: PreTrainedConfig, query_length: int, length: int, dtype: torch.dtype) -> torch.Tensor:
        """
        The mask `(batch, 1, query_length, length)` that attention of transformers takes under it.

        Raises:
            ValueError: if the attention implementation takes no such mask.
        """
        if config._attn_implementation not in ("sdpa", "eager"):
            raise ValueError(f"`attn_implementation={config._attn_implementation!r}` takes no 4-D mask.")
        columns = torch.arange(length, device=self.padding.device)
        queries = self.first_column + torch.arange(query_length, device=self.padding.device)
        limits = (queries // self.block_length + 1) * self.block_length
        visible = (columns < limits[:, None]) & (columns >= self.padding[:, None, None])
        # Padding sees itself: a query that sees nothing gives NaN in some implementations.
        visible = (visible | (columns == queries[:, None]))[:, None]
        if config._attn_implementation == "sdpa":
            return visible
        return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(
            ~visible, torch.finfo(dtype).min
        )


def make_mask(config: PreTrainedConfig, **settings: Any) -> Any:
    """
    The mask that the attention implementation takes, by its own function. Not by `create_bidirectional_mask`, which
    evaluates an additional mask function by `vmap`: that takes longer than a small forward and breaks `torch.export`,
    while this goes by indices as upstream's own masks do.

    Args:
        **settings: What transformers' `AttentionMaskInterface` gives to such a function.

    Raises:
        ValueError: for an attention implementation without a mask function.
    """
    if config._attn_implementation not in ALL_MASK_ATTENTION_FUNCTIONS:
        raise ValueError(
            f"`attn_implementation={config._attn_implementation!r}` has no mask function: register one with "
            "transformers' `AttentionMaskInterface`."
        )
    make = ALL_MASK_ATTENTION_FUNCTIONS[config._attn_implementation]
    return make(config=config, allow_is_causal_skip=False, **settings)


def create_block_causal_mask(
    config: PreTrainedConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | BlockMask | PrefixMask | None,
    past_key_values: Cache | None,
    block_length: int,
    block_start: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
) -> torch.Tensor | BlockMask | PrefixMask | None:
    """
    The mask under which a query sees its own block and all blocks before it: key j for query i where
    `(j - s) // block_length <= (i - s) // block_length`, s being the column at which the row's first block begins.

    Args:
        config: The backbone's configuration; names the attention implementation.
        inputs_embeds: `(batch, query_length, hidden_size)`; only shape, dtype and device are used.
        attention_mask: `(batch, past + query_length)`, 0 for padding; or a 4-D mask or `BlockMask`, returned as it is.
        past_key_values: The cache, whose length is the offset of the first query.
        block_length: Tokens in a block.
        block_start: `(batch,)`, column of each row's first block. Default: the row's first column that is not padding,
            so that a left-padded row is masked like the same row alone.
        position_ids: `(batch or 1, query_length)`, as the caller gave them. Where they start again, without a mask
            and a cache, another document begins, as everywhere in transformers: documents do not see each other, and
            their blocks are counted from position 0.

    Returns:
        What the attention implementation takes: `None` if nothing is hidden, else a mask.

    Raises:
        ValueError: if flash attention is asked for queries of more than one block or for packed documents, which it
            cannot mask; or for an attention implementation without a mask function.
    """
    if attention_mask is not None and not (isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2):
        return attention_mask
    start = past_key_values.get_seq_length() if past_key_values is not None else 0
    batch_size, query_length = inputs_embeds.shape[:2]
    is_one_block = start // block_length == (start + query_length - 1) // block_length
    # A graph cannot depend on what a tensor holds: there a mask is always made, as upstream's are.
    is_padded = attention_mask is not None and (is_tracing(attention_mask) or not bool(attention_mask.all()))
    documents = None  # which one each position belongs to
    if position_ids is not None and attention_mask is None and past_key_values is None:
        position_ids = position_ids.expand(batch_size, -1)
        documents = find_packed_sequence_indices(position_ids)

    if is_flash_attention_requested(config):
        implementation = f"`attn_implementation={config._attn_implementation!r}`"
        if not is_one_block:
            raise ValueError(
                f"{implementation} cannot hide later blocks of one call; give it one block of "
                f"`block_length={block_length}` tokens at a time, or load the model with 'sdpa' or 'flex_attention'."
            )
        if documents is not None:
            torch_compilable_check(
                documents[:, -1] == 0,
                f"{implementation} cannot keep apart the documents that `position_ids` packs into a row; load the "
                "model with 'sdpa' or 'flex_attention'.",
            )
        return attention_mask if is_padded else None
    if is_one_block and not is_padded and documents is None:
        return None

    visible = None
    if attention_mask is not None and is_padded:
        visible = attention_mask.to(torch.bool)
        if block_start is None:
            block_start = attention_mask.to(torch.long).argmax(dim=-1)

    def may_see(
        batch_idx: torch.Tensor, head_idx: torch.Tensor, q_idx: torch.Tensor, kv_idx: torch.Tensor
    ) -> torch.Tensor:
        origin = 0 if block_start is None else block_start[batch_idx]
        earlier_or_same = (kv_idx - origin) // block_length <= (q_idx - origin) // block_length
        if visible is None:
            return earlier_or_same
        # Padding sees itself: a query that sees nothing gives NaN in some implementations.
        return earlier_or_same & (visible[batch_idx, kv_idx] | (kv_idx == q_idx))

    mask_function: Callable = may_see
    if documents is not None and position_ids is not None:
        mask_function = packed_sequence_compatibility_function(may_see, position_ids, documents)
    kv_length, kv_offset = query_length, 0
    if past_key_values is not None:
        start = past_key_values.get_query_offset(0)
        kv_length, kv_offset = past_key_values.get_mask_sizes(query_length, 0)
    return make_mask(
        config,
        batch_size=batch_size,
        q_length=query_length,
        kv_length=kv_length,
        q_offset=start,
        kv_offset=kv_offset,
        mask_function=mask_function,
        dtype=inputs_embeds.dtype,
        device=inputs_embeds.device,
    )
