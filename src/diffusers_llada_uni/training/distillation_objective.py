"""
What a few-step student learns: to say at once where the way from a noisy image ends.

Noise levels sigma fall from 1 to 0. x_sigma = (1 - sigma) x + sigma e is an image's latents x with noise e, and
velocities v point to data, so that a student says of each point that f = x_sigma + sigma v(x_sigma) is where it ends.
"""

from collections.abc import Callable

import torch

from .flow_matching import Latents, squared_errors


# Of noise levels. The embedding of the time has waves of a length of 0.006: over less than that the difference is
# theirs (with 0.001 four times that of 0.02 to 0.05, at the emoji decoder).
DIFFERENCE = 0.03
MINIMUM_SIGMA = 1e-3
OWN_SHARE = 1 / 3  # of images, for the student's own


def draw_noise(latents: Latents, generators: list[torch.Generator]) -> tuple[torch.Tensor, Latents]:
    """Of each image a noise level, uniform, `(batch,)`, and noise, by its generator (on the CPU)."""
    sigmas, noise = [], []
    for x, generator in zip(latents, generators, strict=True):
        sigmas.append(torch.rand((), generator=generator).clamp_min(MINIMUM_SIGMA))
        noise.append(torch.randn(x.shape, generator=generator).to(x.device))
    return torch.stack(sigmas).to(latents[0].device), noise


@torch.no_grad()
def consistency_targets(
    jump: Callable[[Latents, torch.Tensor], Latents], points: Latents, sigmas: torch.Tensor, velocities: Latents
) -> Latents:
    """
    What the student's velocities v have to be so that f does not change on the way on which `velocities` u lead:
    v = u - sigma dv/dsigma, with the derivative along the way by a central difference, whose error is of second order
    (UCGM, arXiv 2505.07447).

    Args:
        jump: The student's velocities of points, two for each of `points`, at noise levels; in float32, as bfloat16
            would lose their difference.
        points, sigmas, velocities: Points, their noise levels `(batch,)`, and where the way leads from them.
    """
    above, below = (sigmas + DIFFERENCE).clamp_max(1), (sigmas - DIFFERENCE).clamp_min(0)
    sides = [
        [x - (other - sigma) * u for x, u, sigma, other in zip(points, velocities, sigmas, side, strict=True)]
        for side in (above, below)
    ]
    values = jump(sides[0] + sides[1], torch.cat([above, below]))
    count = len(points)
    slopes = [
        (a - b) / (high - low) for a, b, high, low in zip(values[:count], values[count:], above, below, strict=True)
    ]
    return [u - sigma * slope for u, sigma, slope in zip(velocities, sigmas, slopes, strict=True)]


def consistency_errors(jumps: Latents, targets: Latents) -> torch.Tensor:
    """
    Mean square errors `(batch,)` with no step of more than 1 toward a target, which holds a derivative of the student
    itself: without, both grow.
    """
    nearer = [(v + (target - v).clamp(-1, 1)).detach() for v, target in zip(jumps, targets, strict=True)]
    return squared_errors(jumps, nearer)
