"""Noisy latents and errors of velocities: what all that is learnt by flow matching needs (arXiv 2210.02747)."""

import torch


Latents = list[torch.Tensor]  # of each image `(channels, 4 * H, 4 * W)`; sizes may differ


def noised(latents: Latents, noise: Latents, sigmas: torch.Tensor) -> Latents:
    """Images at noise levels `(batch,)`, 0 for data to 1 for noise."""
    return [(1 - sigma) * x + sigma * e for sigma, x, e in zip(sigmas, latents, noise, strict=True)]


def velocities_to(latents: Latents, noise: Latents) -> Latents:
    """From noise straight to data."""
    return [x - e for x, e in zip(latents, noise, strict=True)]


def squared_errors(found: Latents, wanted: Latents) -> torch.Tensor:
    """Mean square errors `(batch,)`."""
    return torch.stack([(a - b).square().mean() for a, b in zip(found, wanted, strict=True)])
