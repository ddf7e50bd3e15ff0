"""The attention mask under which noisy copies of documents and the documents themselves share one forward pass."""

import torch
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedConfig

from ...masking_block_causal import make_mask


def positions_of(document_ids: torch.Tensor) -> torch.Tensor:
    """Each token's place in its document, `(batch, length)`, from the documents' numbers `(batch, length)`."""
    places = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return places - (places * begins).cummax(dim=1).values


def block_ids_of(positions: torch.Tensor, block_length: int) -> torch.Tensor:
    """The number of each token's block in its document."""
    return positions.div(block_length, rounding_mode="floor")


def running_block_ids(positions: torch.Tensor, block_length: int) -> torch.Tensor:
    """The number of each token's block, counted through its whole row of documents."""
    return (positions % block_length == 0).cumsum(dim=1) - 1


def create_noisy_clean_mask(
    config: PreTrainedConfig,
    copy_ids: torch.Tensor,
    block_ids: torch.Tensor,
    document_ids: torch.Tensor,
    clean_copy: int,
    dtype: torch.dtype,
) -> torch.Tensor | BlockMask:
    r"""
    The mask of block-diffusion training (BD3-LM, arXiv 2503.09573, section 4.1) for a row `[noisy copies ; clean]`.
    Token i sees token j of the same document where

    - `copy_i == copy_j and block_i == block_j`: its own block of its own copy (the block-diagonal piece), or
    - `copy_j == clean and block_j < block_i`: earlier clean blocks. For a noisy i this is the offset block-causal
      piece, and for a clean i, together with the first line, the block-causal one.

    A noisy block so sees what `generate` shows it: finished blocks and itself. Copies do not see one another.

    Args:
        config: The backbone's configuration; names the attention implementation.
        copy_ids, block_ids, document_ids: `(batch, length)`; of each token the copy, the block within the document,
            and the document. Padding has a document number of its own, and so sees itself.
        clean_copy: The number of the clean copy.
        dtype: Of the model's hidden states.

    Returns:
        What the attention implementation takes: a boolean mask, a float mask, or a compiled `BlockMask`.

    Raises:
        ValueError: for flash attention, which knows no such mask, and for implementations without a mask function.
    """
    if "flash" in config._attn_implementation:
        raise ValueError(
            f"`attn_implementation={config._attn_implementation!r}` has no block-diffusion mask. Load the model with "
            "'flex_attention' (GPU) or 'sdpa' for training."
        )

    def may_see(
        batch_idx: torch.Tensor, head_idx: torch.Tensor, q_idx: torch.Tensor, kv_idx: torch.Tensor
    ) -> torch.Tensor:
        same_document = document_ids[batch_idx, q_idx] == document_ids[batch_idx, kv_idx]
        same_copy = copy_ids[batch_idx, q_idx] == copy_ids[batch_idx, kv_idx]
        query_block, key_block = block_ids[batch_idx, q_idx], block_ids[batch_idx, kv_idx]
        own_block = same_copy & (query_block == key_block)
        earlier_clean = (copy_ids[batch_idx, kv_idx] == clean_copy) & (key_block < query_block)
        return same_document & (own_block | earlier_clean)

    batch_size, length = copy_ids.shape
    return make_mask(
        config,
        batch_size=batch_size,
        q_length=length,
        kv_length=length,
        mask_function=may_see,
        dtype=dtype,
        device=copy_ids.device,
    )
