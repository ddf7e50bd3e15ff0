"""Wrong tokens among those that a noisy copy shows: what token editing learns to repair."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ...input_checks import check_number
from ...seeding import seeded_generator
from .masking import positions_of


@dataclass(frozen=True)
class TokenCorruption:
    r"""
    The second half of what LLaDA2.1 is trained for (arXiv 2602.08676): beside masks a noisy copy shows wrong tokens,
    and the model predicts what should stand there, and what is right as it stands. Decoding with `editing_threshold`
    then replaces what was decoded wrong.

    Wrong are tokens drawn at random (`rate`), and the model's own mistakes (`draft_share`; on-policy uniform training
    of DMax, arXiv 2604.08302): of some blocks all masks are filled with what is likeliest for them, which a forward
    pass without gradient finds from the noised input. Both are repaired from what surrounds them, but only the
    model's own mistakes look as those of decoding do: each word is right by itself, and they do not go together.

    Args:
        rate (`float`, defaults to 0.1): How many of the tokens with a label that are shown are drawn at random.
        weight (`float`, defaults to 1.0): Of the loss of shown tokens, beside 1 for masked ones.
        draft_share (`float`, defaults to 0.0): How many blocks show the model's drafts in the place of masks. DMax has
            0.5 (of rows), at a noise level of 0.75. Such blocks go through the model once more, without gradient.

    Raises:
        ValueError, TypeError: for a rate or a share that is not between 0 and 1, or a negative weight.
    """

    rate: float = 0.1
    weight: float = 1.0
    draft_share: float = 0.0

    def __post_init__(self) -> None:
        check_number("corruption_rate", self.rate, 0.0, 1.0)
        check_number("editing_weight", self.weight, 0.0)
        check_number("draft_share", self.draft_share, 0.0, 1.0)

    def corrupt(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        masked: torch.Tensor,
        weights: torch.Tensor,
        masked_share: torch.Tensor,
        vocabulary: tuple[int, int],
        never_shown: list[int],
        document_ids: torch.Tensor,
        block_length: int,
        generators: list[torch.Generator],
        draft: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Words become other words, image codes other codes, all as probable as another; or what the model drafts.

        Args:
            input_ids, labels: `(batch, length)`.
            masked, weights: `(batch, copies, length)`, from [`BlockDiffusionNoise.sample`].
            masked_share: `(batch, length)`, from [`BlockDiffusionNoise.masked_share`].
            vocabulary: The numbers of text tokens and of all tokens.
            never_shown: Ids that are no tokens to show, see [`never_shown`].
            document_ids, block_length: As for [`BlockDiffusionNoise.sample`].
            generators: One a row, which are not drawn from: numbers of their own come from their seeds, so that what
                was drawn before, and with it the padding, changes nothing.
            draft: With `draft_share`: gets the blocks to draft, `(batch, copies, length)`, and gives the ids which the
                model puts in the place of their masks, of the same shape.

        Returns:
            `shown_ids`, `masked` and `weights`, `(batch, copies, length)`: what stands where nothing is masked, what
            still is, and the weights with those of the shown tokens. Summed over the copies they are expected to be 1
            for masks and `weight` for shown tokens.
        """
        # 1. Numbers of each token and copy: whether it is wrong, which token it is then, and whether it is a draft
        num_copies, length = masked.shape[1:]
        own = [seeded_generator(generator.initial_seed(), 1) for generator in generators]
        rows = [torch.rand(length, 3 * num_copies, generator=one) for one in own]
        is_wrong, which, is_draft = torch.stack(rows).to(masked.device).transpose(1, 2).chunk(3, dim=1)

        # 2. What the model itself would put in, of whole blocks
        shown_ids = input_ids[:, None].expand_as(masked)
        if self.draft_share and draft is not None:
            begins = torch.arange(length, device=masked.device) - positions_of(document_ids) % block_length
            blocks = is_draft.gather(2, begins[:, None].expand_as(masked)) < self.draft_share
            shown_ids = torch.where(masked & blocks, draft(blocks), shown_ids)
            masked = masked & ~blocks
            weights = weights * masked / max(1 - self.draft_share, 1e-6)

        # 3. What nobody would put in
        num_words, num_tokens = vocabulary
        is_shown = ~masked & (labels != -100)[:, None]
        is_image = (labels >= num_words)[:, None]
        first = torch.where(is_image, num_words, 0)
        count = torch.where(is_image, num_tokens - num_words, num_words)
        others = first + (which * count).long().clamp(max=count - 1)
        is_none = torch.isin(others, torch.tensor(never_shown, device=others.device))
        others = torch.where(is_none, input_ids[:, None], others)
        shown_ids = torch.where(is_shown & (is_wrong < self.rate), others, shown_ids)
        shown_share = (1 - masked_share * (1 - self.draft_share)).clamp(min=1e-6)[:, None] * num_copies
        return shown_ids, masked, weights + self.weight * is_shown / shown_share
