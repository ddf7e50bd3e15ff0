"""Wrong tokens in finished blocks, for re-masking to find; shared by a test and a benchmark."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch

from transformers_llada_uni.generation.state import BlockState
from transformers_llada_uni.generation.token_remasking import TokenRemasking


@contextmanager
def planted_errors(share: float, ids: tuple[int, int], seed: int = 0) -> Iterator[list[int]]:
    """
    While it lasts, so large a share of what a block has generated is replaced by random ids of this range (first and
    last-plus-one) when the first check of re-masking begins, where the block is finished. Yields how many there were,
    of each step.
    """
    draw, planted, check = torch.Generator().manual_seed(seed), [], TokenRemasking.check

    def check_and_plant(self: TokenRemasking, state: BlockState) -> None:
        check(self, state)
        shape = state.masked.shape
        where = (torch.rand(shape, generator=draw) < share) & state.generated & (state.num_post_steps == 1)[:, None]
        wrong = torch.randint(*ids, shape, generator=draw)
        state.before.copy_(torch.where(where, wrong, state.before))
        state.write(where & ~state.checked, wrong)
        planted.append(int(where.sum()))

    with patch.object(TokenRemasking, "check", check_and_plant):
        yield planted
