"""Seeds stay what they were: a run that is resumed after an update draws what it would have drawn."""

import torch

from transformers_llada_uni.seeding import seeded_generator


def test_generators_are_seeded_as_ever():
    assert seeded_generator(0).initial_seed() == 7896617691693857887
    assert seeded_generator(1, 0, 2, 3).initial_seed() == 3322602670769483112
    draws = {torch.rand((), generator=seeded_generator(*numbers)).item() for numbers in ((1, 2), (2, 1), (1, 3))}
    assert len(draws) == 3
