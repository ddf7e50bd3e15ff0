"""Random numbers that depend on what they are drawn for, not on the order of the draws. Seeds have one home."""

import numpy as np
import torch


def seeded_generator(*numbers: int) -> torch.Generator:
    """
    A generator on the CPU, seeded by whole numbers of at least 0: a run's seed, a step, a row, ... Zeros at the end
    count for nothing, so one purpose has always equally many numbers.
    """
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)
