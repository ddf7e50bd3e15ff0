"""The sets and weights of likelihood noise, by hand."""

import math

import pytest
import torch

from transformers_llada_uni.evaluation import LikelihoodNoise


def test_weights_by_hand():
    labels = torch.tensor([[-100, -100, 3, 4, 5, 6, 7, 8]])
    masked, weights = LikelihoodNoise(num_samples=15).sample(labels, None, 4, torch.Generator().manual_seed(0))
    assert not masked[:, :, :2].any()
    assert bool((weights[~masked] == 0).all())
    # Two tokens: both hidden, weight 1 / (2 * 1); one hidden, weight 1 / (1 * 2). The rest is not needed.
    assert masked[0, :4, 2:4].tolist() in (
        [[True, True], [False, True], [True, False], [False, False]],
        [[True, True], [True, False], [False, True], [False, False]],
    )
    assert bool((weights[0, :3, 2:4][masked[0, :3, 2:4]] == 0.5).all())
    # Four tokens: every set once, weight 1 / (k * binomial(4, k)).
    sets = [tuple(row) for row in masked[0, :, 4:].tolist()]
    assert len(set(sets)) == 15 and (False,) * 4 not in sets
    for chosen, weight in zip(sets, weights[0, :, 4:].amax(dim=1).tolist(), strict=True):
        assert weight == pytest.approx(1 / (sum(chosen) * math.comb(4, sum(chosen))))


@pytest.mark.parametrize("num_samples", [1, 4, 10, 200])
def test_weights_of_a_block_sum_to_its_tokens(num_samples):
    labels = torch.arange(20).view(2, 10)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    masked, weights = LikelihoodNoise(num_samples).sample(labels, None, 7, generators)
    assert masked.shape == weights.shape == (2, num_samples, 10)
    for block in (slice(0, 7), slice(7, 10)):
        torch.testing.assert_close(weights[:, :, block].sum(dim=(1, 2)), torch.full((2,), len(range(10)[block]) * 1.0))
    if num_samples == 10:  # more than 7 levels, each used
        assert set(masked[0, :, :7].sum(dim=1).tolist()) == set(range(1, 8))
