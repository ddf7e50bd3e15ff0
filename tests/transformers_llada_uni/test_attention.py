import pytest
import torch
from transformers.integrations import sdpa_attention

from tests.transformers_llada_uni.generation.property_cases import tiny_backbone
from transformers_llada_uni.attention import shared_key_value_attention_forward


class GroupsOfFour(torch.nn.Module):
    num_key_value_groups = 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_agrees_with_repeated_heads_in_output_and_gradient(dtype):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 8, 6, 16, generator=generator).to(dtype)
    buffer = torch.randn(2, 2, 2, 40, 16, generator=generator).to(dtype)
    mask = torch.rand(2, 1, 6, 25, generator=generator) < 0.7
    results = []
    for attention in (sdpa_attention.sdpa_attention_forward, shared_key_value_attention_forward):
        inputs = [query.clone().requires_grad_(), buffer.clone().requires_grad_()]
        key, value = inputs[1][:, :, :, :25]
        output, weights = attention(GroupsOfFour(), inputs[0], key, value, mask, scaling=0.3, is_causal=False)
        output.sin().sum().backward()
        assert weights is None
        results.append([output, *(tensor.grad for tensor in inputs)])
    tolerance = 1e-1 if dtype == torch.bfloat16 else 1e-5
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_decoding_with_a_mask_copies_no_keys(monkeypatch):
    """A padded row needs a mask in every step; none of them may repeat the cache's heads."""

    def refuse(*args):
        raise AssertionError("keys or values were repeated")

    monkeypatch.setattr(sdpa_attention, "repeat_kv", refuse)
    ids = torch.arange(1, 21).view(2, 10)
    attention_mask = torch.ones_like(ids)
    attention_mask[0, :3] = 0
    tiny_backbone().generate(ids, attention_mask=attention_mask, max_new_tokens=16, block_length=8)
