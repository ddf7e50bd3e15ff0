"""Between a mean over tokens and a mean over documents: what a document weighs by its length."""

import torch


def length_weights(masked: torch.Tensor, document_ids: torch.Tensor) -> torch.Tensor:
    r"""
    The weight of each document's tokens, `beta = 1 / sqrt(number of its masked tokens)` (LLaDA2.0-Uni,
    arXiv 2604.20796, eq. 6): with it the gradient of a document grows with the root of its length.

    Args:
        masked: `(batch, copies, length)`, or how probable that is; a document's masked tokens are counted as the mean
            over the copies.
        document_ids: `(batch, length)`, counted from any number, -1 for padding.

    Returns:
        `(batch, length)`; 1 for padding, and for documents of which nothing is masked.
    """
    num_masked = masked.float().mean(dim=1)
    numbers = document_ids - document_ids.amin(dim=1, keepdim=True)
    counts = torch.zeros_like(num_masked).scatter_add_(1, numbers, num_masked).gather(1, numbers)
    return torch.where((counts > 0) & (document_ids >= 0), counts.clamp(min=1e-6).rsqrt(), 1.0)


def length_sums(labels: torch.Tensor, document_ids: torch.Tensor, masked_share: torch.Tensor) -> torch.Tensor:
    """
    `(2,)`: the number of tokens with a label, and the sum of their [`length_weights`] as they are expected before the
    noise is drawn. The first over the second makes the weights' mean one.

    Args:
        labels, document_ids: `(batch, length)`.
        masked_share: `(batch, length)`, how probable it is that a token is masked.
    """
    has_label = labels != -100
    weights = length_weights((has_label * masked_share)[:, None], document_ids)
    return torch.stack([has_label.sum(), (weights * has_label).sum()])
