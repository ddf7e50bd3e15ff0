"""The consistency objective, at flows whose ends are known."""

import torch

from diffusers_llada_uni.training.distillation_objective import (
    DIFFERENCE,
    MINIMUM_SIGMA,
    consistency_errors,
    consistency_targets,
    draw_noise,
)
from diffusers_llada_uni.training.flow_matching import noised


def test_the_exact_consistency_function_is_its_own_target():
    """Latents of deviation s: velocities are linear, and where a point ends is known."""
    deviation = 0.5
    variance = torch.tensor(deviation**2, dtype=torch.float64)

    def velocity(x, sigma):
        return x * ((1 - sigma) * variance - sigma) / ((1 - sigma) ** 2 * variance + sigma**2)

    def jump(points, sigmas):
        scale = deviation / ((1 - sigmas) ** 2 * variance + sigmas**2).sqrt()
        return [x * (s - 1) / sigma for x, s, sigma in zip(points, scale, sigmas, strict=True)]

    sigmas = torch.linspace(0.1, 1, 10, dtype=torch.float64)
    points = list(torch.randn(10, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    velocities = [velocity(x, sigma) for x, sigma in zip(points, sigmas, strict=True)]
    targets = consistency_targets(jump, points, sigmas, velocities)
    for target, exact in list(zip(targets, jump(points, sigmas), strict=True))[:-1]:
        torch.testing.assert_close(target, exact, rtol=0, atol=0.01)  # of second order in the difference
    torch.testing.assert_close(targets[-1], jump(points, sigmas)[-1], rtol=0, atol=0.1)  # one-sided at noise
    # One that never changes must be the velocity
    wrong = consistency_targets(lambda points, sigmas: velocities * 2, points, sigmas, velocities)
    assert all(torch.equal(a, b) for a, b in zip(wrong, velocities, strict=True))


def test_both_sides_of_a_point_lie_on_its_way():
    seen = []

    def jump(points, sigmas):
        seen.append((points, sigmas))
        return points

    x, e = torch.full((1, 2, 2), 3.0), torch.full((1, 2, 2), -1.0)
    sigmas = torch.tensor([0.5, 0.99])
    consistency_targets(jump, noised([x, x], [e, e], sigmas), sigmas, [x - e, x - e])
    ((points, levels),) = seen
    torch.testing.assert_close(levels, torch.tensor([0.5 + DIFFERENCE, 1, 0.5 - DIFFERENCE, 0.99 - DIFFERENCE]))
    for point, expected in zip(points, noised([x] * 4, [e] * 4, levels), strict=True):
        torch.testing.assert_close(point, expected)


def test_a_target_far_away_is_approached_by_one():
    jumps = [torch.tensor([0.0, 0.0], requires_grad=True)]
    error = consistency_errors(jumps, [torch.tensor([0.5, -7.0])])
    torch.testing.assert_close(error, torch.tensor([(0.25 + 1) / 2]))
    error.sum().backward()
    torch.testing.assert_close(jumps[0].grad, torch.tensor([-0.5, 1.0]))


def test_noise_is_that_of_each_image():
    latents = [torch.zeros(4, 4, 4), torch.zeros(4, 8, 4)]
    sigmas, noise = draw_noise(latents, [torch.Generator().manual_seed(seed) for seed in (0, 1)])
    alone, noise_alone = draw_noise(latents[1:], [torch.Generator().manual_seed(1)])
    assert torch.equal(sigmas[1:], alone) and torch.equal(noise[1], noise_alone[0])
    assert ((sigmas >= MINIMUM_SIGMA) & (sigmas < 1)).all() and [n.shape for n in noise] == [x.shape for x in latents]
