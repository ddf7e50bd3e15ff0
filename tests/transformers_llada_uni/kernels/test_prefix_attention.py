"""Attention to buffers gives what the mask says, of whatever else they hold."""

from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F

from tests.transformers_llada_uni.kernels.common import DEVICE, DTYPES, assert_equal_but_for_rounding, random
from transformers_llada_uni.kernels import prefix_attention as module
from transformers_llada_uni.kernels.prefix_attention import can_attend_to_prefix, num_splits, prefix_attention


@dataclass
class Case:
    width: int
    first_column: int
    buffer_length: int
    block_length: int
    padding: list[int] = field(default_factory=lambda: [0])
    heads: int = 4
    key_value_heads: int = 2
    head_dim: int = 16
    query_scale: float = 1.0

    def tensors(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys, values, and what each query sees `(rows, 1, width, buffer_length)`."""
        rows = len(self.padding)
        query = random(rows, self.width, self.heads, self.head_dim, dtype=dtype, seed=1, scale=self.query_scale)
        # A part of larger buffers
        keys, values = random(2, rows, self.key_value_heads, self.buffer_length + 3, self.head_dim, dtype=dtype)
        keys, values = keys[:, :, : self.buffer_length], values[:, :, : self.buffer_length]
        column = torch.arange(self.buffer_length, device=DEVICE)
        query_column = torch.arange(self.first_column, self.first_column + self.width, device=DEVICE)
        limit = (query_column // self.block_length + 1) * self.block_length
        padding = torch.tensor(self.padding, device=DEVICE)[:, None]
        is_seen = (column >= padding)[:, None, :] & (column < limit[:, None])
        is_seen &= (query_column >= padding)[:, :, None]
        return query, keys, values, is_seen[:, None]

    def run(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        first_column = torch.tensor(self.first_column, device=DEVICE)
        padding = torch.tensor(self.padding, device=DEVICE)
        return prefix_attention(query, keys, values, first_column, padding, self.block_length, self.head_dim**-0.5)


CASES = {
    "odd": Case(7, 9, 40, 5, padding=[0, 4]),
    "one block": Case(32, 32, 96, 32, padding=[3]),
    "first block": Case(5, 0, 300, 5),
    "prompt": Case(50, 0, 64, 8, padding=[0, 13, 50]),
    "prompt, odd": Case(37, 11, 64, 5, padding=[14, 0, 48, 47]),
    "width 1": Case(1, 17, 33, 3, padding=[0, 17]),
    "end of the buffer": Case(4, 33, 37, 32, padding=[35]),
    "split": Case(9, 301, 520, 5, padding=[0, 250]),
    "split, little written": Case(3, 2, 2100, 32, padding=[0]),
    "split, block wider than a share": Case(5, 130, 520, 200, padding=[0, 135]),
    "groups of 3": Case(13, 20, 64, 6, heads=6, key_value_heads=2, head_dim=32),
    "a head for each": Case(6, 10, 32, 4, heads=2, key_value_heads=2),
    "released heads": Case(20, 38, 140, 32, heads=16, key_value_heads=4, head_dim=128),
    "large scores": Case(9, 140, 300, 5, padding=[0, 50], query_scale=60.0),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_formula(dtype, name):
    check(CASES[name], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["split", "split, block wider than a share", "large scores"])
def test_equals_the_formula_where_it_would_be_split(monkeypatch, dtype, name):
    monkeypatch.setattr(module, "PROGRAMS_TO_FILL", 0)
    check(CASES[name], dtype)


def check(case: Case, dtype: torch.dtype) -> None:
    query, keys, values, is_seen = case.tensors(dtype)
    wanted = F.scaled_dot_product_attention(
        query.double().transpose(1, 2), keys.double(), values.double(), attn_mask=is_seen, enable_gqa=True
    ).transpose(1, 2)
    is_blind = ~is_seen[:, 0].any(dim=-1)
    wanted[is_blind] = 0.0

    # What no query of the row sees is not read.
    is_unseen = ~is_seen.any(dim=2)[..., None]
    keys, values = keys.masked_fill_(is_unseen, float("nan")), values.masked_fill_(is_unseen, float("nan"))
    found = case.run(query, keys, values)
    assert found.shape == (len(case.padding), case.width, case.heads * case.head_dim)
    assert found.dtype == dtype and found.is_contiguous()
    assert bool((found[is_blind] == 0).all())
    # Weights are rounded to the dtype too, before they are multiplied with values; scores, however large, in float32.
    rounding_of_scores = 1e-6 * case.query_scale
    assert_equal_but_for_rounding(found, wanted.flatten(-2), roundings=4, atol=rounding_of_scores)


def test_cases_are_split_and_not():
    splits = {}
    for name, case in CASES.items():
        positions = module.TILES[torch.float32][0] // (case.heads // case.key_value_heads)
        programs = len(case.padding) * case.key_value_heads * -(-case.width // positions)
        splits[name] = num_splits(programs, case.buffer_length)
    assert splits["split"] == 4 and splits["split, little written"] == 16 and splits["odd"] == 1


def test_splits_follow_from_shapes_and_fill_the_card():
    assert num_splits(programs=8, buffer_length=8192) == 16
    assert num_splits(programs=32, buffer_length=8192) == 8
    assert num_splits(programs=32, buffer_length=512) == 4  # not into shares that are not worth a launch
    assert num_splits(programs=8, buffer_length=64) == 1
    assert num_splits(programs=133, buffer_length=8192) == num_splits(programs=5000, buffer_length=8192) == 1


def test_knows_which_heads_it_serves():
    assert can_attend_to_prefix(torch.bfloat16, 128, 16, 4)
    assert can_attend_to_prefix(torch.float32, 16, 4, 2)
    assert not can_attend_to_prefix(torch.float64, 128, 16, 4)
    assert not can_attend_to_prefix(torch.bfloat16, 8, 16, 4)
    assert not can_attend_to_prefix(torch.bfloat16, 96, 16, 4)
    assert not can_attend_to_prefix(torch.bfloat16, 256, 16, 4)
    assert not can_attend_to_prefix(torch.float32, 64, 64, 1)


def test_refuses_what_does_not_fit():
    case = CASES["odd"]
    query, keys, values, _ = case.tensors(torch.float32)
    column, padding = torch.tensor(9, device=DEVICE), torch.tensor([0, 4], device=DEVICE)
    for call in (
        lambda: prefix_attention(query.transpose(1, 2), keys, values, column, padding, 5, 1.0),
        lambda: prefix_attention(query[:, :, :3].contiguous(), keys, values, column, padding, 5, 1.0),
        lambda: prefix_attention(query, keys[:1], values[:1], column, padding, 5, 1.0),
        lambda: prefix_attention(query, keys, values[:, :, 1:], column, padding, 5, 1.0),
        lambda: prefix_attention(query, keys, values, column, padding[:1], 5, 1.0),
        lambda: prefix_attention(query, keys, values, column, padding, 0, 1.0),
    ):
        with pytest.raises(AssertionError):
            call()
