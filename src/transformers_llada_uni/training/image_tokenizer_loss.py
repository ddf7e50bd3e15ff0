"""Losses of the image tokenizer, and what is reported of its codebook."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.nn.functional import all_gather


def sigmoid_contrastive_loss(
    image_embeds: torch.Tensor, text_embeds: torch.Tensor, logit_scale: torch.Tensor, logit_bias: torch.Tensor
) -> torch.Tensor:
    r"""
    SigLIP's loss (arXiv 2303.15343, eq. 1) with the texts of all processes:

        L = -1/n sum_i sum_j log sigmoid(z_ij (t x_i . y_j + b)),   z_ij = 1 where i = j, else -1.

    Args:
        image_embeds (`torch.Tensor` of shape `(batch, width)`): x, of length one; those of this process.
        text_embeds (`torch.Tensor` of shape `(batch, width)`): y, of length one; those of this process.
        logit_scale (`torch.Tensor`): log t.
        logit_bias (`torch.Tensor`): b.

    Returns:
        A scalar. Its mean over the processes is the loss of one process with all pairs.
    """
    batch_size, first = len(image_embeds), 0
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        text_embeds = torch.cat(all_gather(text_embeds))  # hands gradients back
        first = dist.get_rank() * batch_size
    logits = image_embeds @ text_embeds.T * logit_scale.exp() + logit_bias
    signs = -torch.ones_like(logits)
    rows = torch.arange(batch_size, device=logits.device)
    signs[rows, first + rows] = 1
    return -F.logsigmoid(signs * logits).sum() / batch_size


def codebook_statistics(counts: torch.Tensor) -> dict[str, float]:
    """
    Of how often each code was used `(codes,)`: the share of codes that were used at all, and the perplexity, the
    number of codes that would carry as much information if they were used alike.
    """
    shares = counts.float() / counts.sum().clamp(min=1)
    entropy = -(shares * shares.clamp(min=torch.finfo(torch.float32).tiny).log()).sum()
    return {
        "codebook_usage": (counts > 0).float().mean().item(),
        "codebook_perplexity": entropy.exp().item() if counts.sum() else 0.0,
    }


def recall_at_one(image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> dict[str, float]:
    """
    The share of images whose own text `(pairs, width)` is the nearest, and of texts whose own image is. Among
    equal texts each is right.
    """
    similarity = image_embeds @ text_embeds.T
    own = similarity.diagonal()
    return {
        "image_to_text_recall": (own >= similarity.max(dim=1).values - 1e-6).float().mean().item(),
        "text_to_image_recall": (own >= similarity.max(dim=0).values - 1e-6).float().mean().item(),
    }
