"""Behind the fused projection queries, keys and values are those of the model's modules, and lie where they should."""

import pytest
import torch
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeRotaryEmbedding, apply_rotary_pos_emb

from tests.transformers_llada_uni.kernels.common import DEVICE, DTYPES, assert_equal_but_for_rounding, random
from transformers_llada_uni import LLaDA2MoeConfig
from transformers_llada_uni.attention import LLaDA2MoeAttention
from transformers_llada_uni.kernels.rotary import rotate_and_store


pytestmark = pytest.mark.parametrize("dtype", DTYPES)
UNTOUCHED = -7.0


class Case:
    """A call of `rotate_and_store`, and what the modules of the model make of the same projection."""

    def __init__(self, dtype, rows=3, width=7, heads=4, key_value_heads=2, head_dim=16, rotary=0.5, position_rows=3):
        self.heads, self.key_value_heads, self.head_dim = heads, key_value_heads, head_dim
        self.rows, self.width, self.dtype = rows, width, dtype
        config = LLaDA2MoeConfig(
            hidden_size=32,
            num_attention_heads=heads,
            num_key_value_heads=key_value_heads,
            head_dim=head_dim,
            rope_parameters={"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": rotary},
        )
        self.attention = LLaDA2MoeAttention(config, layer_idx=0).requires_grad_(False)
        for seed, module in enumerate((self.attention.query_layernorm, self.attention.key_layernorm)):
            module.weight.copy_(1 + random(head_dim, seed=seed, scale=0.3))
        self.attention.to(DEVICE, dtype)
        position_ids = torch.arange(position_rows * width, device=DEVICE).view(position_rows, width) * 3
        self.projection = random(rows, width, (heads + 2 * key_value_heads) * head_dim, dtype=dtype, scale=2.0)
        self.cos, self.sin = Glm4MoeRotaryEmbedding(config).to(DEVICE)(self.projection, position_ids)

    def wanted(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """In float64: queries `(rows, width, heads, head_dim)`, keys and values `(rows, heads, width, head_dim)`."""
        attention = self.attention.double()
        query, key, value = (
            self.projection.double()
            .unflatten(-1, (-1, self.head_dim))
            .split([self.heads, self.key_value_heads, self.key_value_heads], dim=-2)
        )
        query, key = attention.query_layernorm(query).transpose(1, 2), attention.key_layernorm(key).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, self.cos.double(), self.sin.double())
        return query.transpose(1, 2), key, value.transpose(1, 2)

    def buffers(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (2, self.rows, self.key_value_heads, length, self.head_dim)
        return torch.full(shape, UNTOUCHED, dtype=self.dtype, device=DEVICE).unbind()

    def run(self, keys: torch.Tensor, values: torch.Tensor, first_column: int, **changed) -> torch.Tensor:
        attention = self.attention.to(self.dtype)
        arguments = {
            "query_key_value": self.projection,
            "query_weight": attention.query_layernorm.weight,
            "key_weight": attention.key_layernorm.weight,
            "eps": attention.query_layernorm.variance_epsilon,
            "cos": self.cos,
            "sin": self.sin,
            "keys": keys,
            "values": values,
            "first_column": torch.tensor(first_column, device=DEVICE),
            "num_heads": self.heads,
            "num_key_value_heads": self.key_value_heads,
        }
        return rotate_and_store(**arguments | changed)


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"position_rows": 1},  # one row of angles for all
        {"rows": 1, "width": 1, "position_rows": 1},
        {"heads": 3, "key_value_heads": 1, "head_dim": 24},  # no powers of two
        {"rotary": 1.0},
        {"rows": 1, "width": 5, "position_rows": 1, "heads": 16, "key_value_heads": 4, "head_dim": 128},
    ],
)
def test_equals_the_modules(dtype, shape):
    case, first_column = Case(dtype, **shape), 5
    keys, values = case.buffers(20)
    query = case.run(keys, values, first_column)
    wanted_query, wanted_keys, wanted_values = case.wanted()
    assert query.is_contiguous() and query.dtype == dtype
    assert_equal_but_for_rounding(query, wanted_query)
    written = slice(first_column, first_column + case.width)
    assert_equal_but_for_rounding(keys[:, :, written], wanted_keys)
    assert torch.equal(values[:, :, written].double(), wanted_values)
    for buffer in (keys, values):
        buffer[:, :, written] = UNTOUCHED
        assert bool((buffer == UNTOUCHED).all())


def test_float32_angles(dtype):
    case = Case(dtype)
    keys, values = case.buffers(7)
    query = case.run(keys, values, 0, cos=case.cos.float(), sin=case.sin.float())
    assert_equal_but_for_rounding(query, case.wanted()[0])


def test_columns_behind_the_buffer_are_dropped(dtype):
    """Also where the buffer is a part of a larger one, whose columns go on."""
    case = Case(dtype)
    keys, values = case.buffers(20)
    query = case.run(keys[:, :, :10], values[:, :, :10], 6)
    wanted_query, wanted_keys, wanted_values = case.wanted()
    assert_equal_but_for_rounding(query, wanted_query)
    assert_equal_but_for_rounding(keys[:, :, 6:10], wanted_keys[:, :, :4])
    assert torch.equal(values[:, :, 6:10].double(), wanted_values[:, :, :4])
    for buffer in (keys, values):
        assert bool((buffer[:, :, 10:] == UNTOUCHED).all() and (buffer[:, :, :6] == UNTOUCHED).all())


def test_refuses_what_does_not_fit(dtype):
    case = Case(dtype)
    keys, values = case.buffers(20)
    for call in (
        lambda: case.run(keys, values, 0, num_heads=5),
        lambda: case.run(keys, values, 0, cos=case.cos[:2], sin=case.sin[:2]),
        lambda: case.run(keys, values, 0, cos=case.cos[:1].expand(3, -1, -1)),
        lambda: case.run(keys[:2], values[:2], 0),
        lambda: case.run(keys, values[:, :, 1:], 0),
        lambda: case.run(keys[:, :, ::2], values[:, :, ::2], 0),
    ):
        with pytest.raises(AssertionError):
            call()
