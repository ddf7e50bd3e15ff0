"""Wrong tokens among those that a noisy copy shows: what token editing learns to repair."""

from dataclasses import dataclass

import torch

from ...input_checks import check_number


@dataclass(frozen=True)
class TokenCorruption:
    r"""
    The second half of what LLaDA2.1 is trained for (arXiv 2602.08676): beside masks a noisy copy shows wrong tokens,
    and the model predicts what should stand there, and what is right as it stands. Decoding with `editing_threshold`
    then replaces what was decoded wrong.

    Args:
        rate (`float`, defaults to 0.1): How many of the tokens with a label that are shown are wrong.
        weight (`float`, defaults to 1.0): Of the loss of shown tokens, beside 1 for masked ones.

    Raises:
        ValueError, TypeError: for a rate that is not between 0 and 1, or a negative weight.
    """

    rate: float = 0.1
    weight: float = 1.0

    def __post_init__(self) -> None:
        check_number("corruption_rate", self.rate, 0.0, 1.0)
        check_number("editing_weight", self.weight, 0.0)

    def corrupt(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        masked: torch.Tensor,
        weights: torch.Tensor,
        masked_share: torch.Tensor,
        vocabulary: tuple[int, int, int],
        generators: list[torch.Generator],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Words become other words, image codes other codes, all as probable as another.

        Args:
            input_ids, labels: `(batch, length)`.
            masked, weights: `(batch, copies, length)`, from [`BlockDiffusionNoise.sample`].
            masked_share: `(batch, length)`, from [`BlockDiffusionNoise.masked_share`].
            vocabulary: The numbers of text tokens and of all tokens, and the mask token, which is never shown.
            generators: One a row, after it has drawn the noise.

        Returns:
            `shown_ids` and `weights`, `(batch, copies, length)`: what stands where nothing is masked, and the weights
            with those of the shown tokens, whose sum over the copies is expected to be `weight`.
        """
        num_copies, length = masked.shape[1:]
        num_words, num_tokens, mask_token_id = vocabulary
        rows = [torch.rand(length, 2 * num_copies, generator=one, device=one.device) for one in generators]
        is_wrong, which = torch.stack(rows).to(masked.device).transpose(1, 2).chunk(2, dim=1)
        is_shown = ~masked & (labels != -100)[:, None]
        is_image = (labels >= num_words)[:, None]
        first = torch.where(is_image, num_words, 0)
        count = torch.where(is_image, num_tokens - num_words, num_words)
        others = first + (which * count).long().clamp(max=count - 1)
        others = torch.where(others == mask_token_id, input_ids[:, None], others)
        shown_ids = torch.where(is_shown & (is_wrong < self.rate), others, input_ids[:, None])
        shown_share = (1 - masked_share).clamp(min=1e-6)[:, None] * num_copies
        return shown_ids, weights + self.weight * is_shown / shown_share
