"""The block-causal attention mask, for every attention implementation of transformers."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.masking_utils import create_bidirectional_mask
from transformers.utils.generic import is_flash_attention_requested


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


def create_block_causal_mask(
    config: PreTrainedConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    past_key_values: Cache | None,
    block_length: int,
    block_start: torch.Tensor | None = None,
):
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

    Returns:
        What the attention implementation takes: `None` if nothing is hidden, else a mask.

    Raises:
        ValueError: if flash attention is asked for queries of more than one block, which it cannot mask.
    """
    if attention_mask is not None and not (isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2):
        return attention_mask
    start = past_key_values.get_seq_length() if past_key_values is not None else 0
    query_length = inputs_embeds.shape[1]
    is_padded = attention_mask is not None and not bool(attention_mask.all())
    one_block = not is_padded and start // block_length == (start + query_length - 1) // block_length
    if is_flash_attention_requested(config):
        if start // block_length != (start + query_length - 1) // block_length:
            raise ValueError(
                f"`attn_implementation={config._attn_implementation!r}` cannot hide later blocks of one call; give it "
                f"one block of `block_length={block_length}` tokens at a time, or load the model with 'sdpa' or "
                "'flex_attention'."
            )
        return attention_mask if is_padded else None
    if one_block:
        return None

    if block_start is None and is_padded:
        block_start = attention_mask.to(torch.long).argmax(dim=-1)
    visible = attention_mask.to(torch.bool) if is_padded else None

    def may_see(batch_idx, head_idx, q_idx, kv_idx):
        origin = 0 if block_start is None else block_start[batch_idx]
        earlier_or_same = (kv_idx - origin) // block_length <= (q_idx - origin) // block_length
        if visible is None:
            return earlier_or_same
        # Padding sees itself: a query that sees nothing gives NaN in some implementations.
        return earlier_or_same & (visible[batch_idx, kv_idx] | (kv_idx == q_idx))

    return create_bidirectional_mask(
        config=config,
        inputs_embeds=inputs_embeds,
        attention_mask=None,
        past_key_values=past_key_values,
        and_mask_function=may_see,
    )
