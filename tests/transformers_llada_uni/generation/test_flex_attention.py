"""`attn_implementation="flex_attention"` on CUDA: inductor's kernel for short queries is not asked for too many."""

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from transformers_llada_uni import LLaDA2MoeConfig
from transformers_llada_uni.attention import LLaDA2MoeAttention


class OnCuda(torch.Tensor):
    """Says of itself, and of what is made of it, that it is on a GPU."""

    is_cuda = property(lambda self: True)


@pytest.mark.parametrize(
    "length, groups, implementation, is_asked",
    [
        (32, 4, "flex_attention", False),  # 128 of a key head: they fit
        (33, 4, "flex_attention", True),
        (127, 4, "flex_attention", True),
        (128, 4, "flex_attention", False),  # no longer short
        (33, 1, "flex_attention", False),
        (33, 4, "eager", False),
    ],
)
def test_the_kernel_for_short_queries(monkeypatch, length, groups, implementation, is_asked):
    config = LLaDA2MoeConfig(hidden_size=16, num_attention_heads=4, num_key_value_heads=4 // groups, head_dim=4)
    config._attn_implementation = implementation
    attention = LLaDA2MoeAttention(config, layer_idx=0)
    options = []

    def interface(module, query, key, value, attention_mask, **kwargs):
        options.append(kwargs.get("kernel_options"))
        return query.transpose(1, 2), None

    monkeypatch.setattr(ALL_ATTENTION_FUNCTIONS, "get_interface", lambda *_: interface)
    hidden_states = torch.zeros(1, length, 16).as_subclass(OnCuda)
    position_embeddings = torch.ones(1, length, 2), torch.zeros(1, length, 2)
    with torch.no_grad():
        attention(hidden_states, position_embeddings, attention_mask=None)
        attention(torch.zeros(1, length, 16), position_embeddings, attention_mask=None)  # on a CPU
    assert options == [{"FORCE_USE_FLEX_ATTENTION": True} if is_asked else None, None]
