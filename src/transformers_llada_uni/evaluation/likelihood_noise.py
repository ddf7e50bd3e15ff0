"""Which tokens are hidden to estimate a likelihood bound: more precise than training's noise with as many samples."""

import itertools
import math
from dataclasses import dataclass

import torch

from ..input_checks import check_integer
from ..training.objective.masking import positions_of
from ..training.objective.noise import settle_noise_inputs


@dataclass(frozen=True)
class LikelihoodNoise:
    r"""
    Noise for the bound that [`BlockDiffusionNoise`] with `noise_range=(0, 1)` estimates, with the level t integrated
    out. In a block with n tokens to predict, a set S of k hidden tokens has the weight

        integral of t^k (1 - t)^(n - k) / t over t  =  1 / (k * binomial(n, k)),

    that is: k is uniform on 1..n, S is any set of that size, and its tokens weigh n / k (LLaDA, arXiv 2502.09992,
    eq. 14, per block). Nothing is ever spent on an empty S.

    - A block with `2**n - 1 <= num_samples` is enumerated: its bound is exact. With one token, as in blocks of length
      1, the bound is the likelihood itself.
    - In larger blocks k is stratified over the samples.

    Args:
        num_samples (`int`, defaults to 32): Noisy copies.

    Raises:
        ValueError: for fewer than one sample.
    """

    num_samples: int = 32

    def __post_init__(self):
        check_integer("num_samples", self.num_samples, 1)

    def sample(
        self,
        labels: torch.Tensor,
        document_ids: torch.Tensor | None,
        block_length: int,
        generator: torch.Generator | list[torch.Generator],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As [`BlockDiffusionNoise.sample`]: `masked` and `weights`, both `(batch, num_samples, length)`."""
        document_ids, generators = settle_noise_inputs(labels, document_ids, block_length, generator)
        batch_size, length = labels.shape

        positions = positions_of(document_ids)
        begins = (torch.arange(length, device=labels.device) - positions % block_length).cpu()
        is_target = (labels != -100).cpu()
        masked = torch.zeros(batch_size, self.num_samples, length, dtype=torch.bool)
        weights = torch.zeros(batch_size, self.num_samples, length)
        for row, one in enumerate(generators):
            # A token's numbers stand together, so that a longer row begins with the numbers of a shorter one.
            numbers = torch.rand(length, 1 + self.num_samples, generator=one, device=one.device).cpu()
            for begin in begins[row, is_target[row]].unique().tolist():
                targets = ((begins[row] == begin) & is_target[row]).nonzero().squeeze(1)  # [n]
                hidden, weight = self._of_block(numbers[targets])
                masked[row, :, targets] = hidden
                weights[row, :, targets] = weight
        return masked.to(labels.device), weights.to(labels.device)

    def _of_block(self, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Both `(num_samples, n)`, from uniform numbers `(n, 1 + num_samples)`."""
        num_tokens, num_samples = len(numbers), self.num_samples
        if num_tokens < 63 and 2**num_tokens - 1 <= num_samples:
            sets = [chosen for chosen in itertools.product((False, True), repeat=num_tokens) if any(chosen)]
            sets.sort(key=sum, reverse=True)
            hidden = torch.zeros(num_samples, num_tokens, dtype=torch.bool)
            hidden[: len(sets)] = torch.tensor(sets)
            weight = torch.zeros(num_samples, 1)
            weights = [1 / (size * math.comb(num_tokens, size)) for size in map(sum, sets)]
            weight[: len(sets), 0] = torch.tensor(weights)
            return hidden, hidden * weight
        levels = (torch.arange(num_samples) + numbers[0, 0]) / num_samples
        sizes = (levels * num_tokens).long().clamp(max=num_tokens - 1) + 1  # [s]
        ranks = numbers[:, 1:].argsort(dim=0).argsort(dim=0).T  # [s, n]
        hidden = ranks < sizes[:, None]
        return hidden, hidden * (num_tokens / sizes[:, None] / num_samples)


__all__ = ["LikelihoodNoise"]
