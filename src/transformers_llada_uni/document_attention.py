"""Attention of rows in which documents lie side by side that do not see one another, one document at a time."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass
class PackedDocuments:
    """
    Where the documents of a batch of rows lie.

    On a CPU, attention under a dense mask computes all that the mask then hides: of a row of many short documents that
    is most of it. One by one, nothing is wasted. A GPU would wait for so many small kernels, and has flex_attention.

    Args:
        order: `(batch * length,)`, the numbers of all tokens, document by document.
        places: `(batch * length,)`, where in that order each token stands.
        lengths: Tokens of each document.
        masks: Of each document who sees whom, boolean, `(1, 1, tokens, tokens)`.
    """

    order: torch.Tensor
    places: torch.Tensor
    lengths: list[int]
    masks: list[torch.Tensor]

    @classmethod
    def of(cls, document_ids: torch.Tensor, mask: torch.Tensor) -> "PackedDocuments":
        """
        Args:
            document_ids: `(batch, length)`, of each token the number of its document in its row; any numbers, and the
                tokens of a document need not be neighbours.
            mask: `(batch, 1, length, length)`, boolean, false between documents.
        """
        batch_size, length = document_ids.shape
        _, of_row = document_ids.unique(return_inverse=True)
        rows = torch.arange(batch_size, device=document_ids.device)[:, None]
        numbers = (rows * (of_row.max() + 1) + of_row).flatten()
        order = numbers.argsort(stable=True)
        _, counts = numbers[order].unique_consecutive(return_counts=True)
        masks = []
        for tokens in order.split(counts.tolist()):
            row, places = tokens[0] // length, tokens % length
            masks.append(mask[row, 0][places][:, places][None, None])
        return cls(order, order.argsort(), counts.tolist(), masks)


def attention_within_documents(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: PackedDocuments,
    dropout: float = 0.0,
    scaling: float | None = None,
) -> torch.Tensor:
    """
    Args:
        query: `(batch, heads, length, head_dim)`.
        key, value: `(batch, key_value_heads, length, head_dim)`; each head serves the query heads of its group.

    Returns:
        `(batch, length, heads, head_dim)`.
    """
    batch_size, num_heads, length, head_dim = query.shape

    def by_documents(states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        tokens = states.transpose(1, 2).reshape(batch_size * length, states.shape[1], head_dim)
        return tokens.index_select(0, documents.order).split(documents.lengths)

    outputs = []
    by_document = zip(*map(by_documents, (query, key, value)), documents.masks, strict=True)
    for queries, keys, values, mask in by_document:
        attended = F.scaled_dot_product_attention(
            queries.transpose(0, 1)[None],
            keys.transpose(0, 1)[None],
            values.transpose(0, 1)[None],
            attn_mask=mask,
            dropout_p=dropout,
            scale=scaling,
            enable_gqa=True,
        )
        outputs.append(attended[0].transpose(0, 1))
    tokens = torch.cat(outputs).index_select(0, documents.places)
    return tokens.view(batch_size, length, num_heads, head_dim)
