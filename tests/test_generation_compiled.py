"""A step of the backbone with the cache compiles as one graph, without breaks and not anew for every block."""

import pytest
import torch
from torch._dynamo.utils import counters

from transformers_llada_uni import LLaDA2MoeConfig, LLaDA2MoeForBlockDiffusion
from transformers_llada_uni.block_diffusion_cache import BlockDiffusionCache


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LLaDA2MoeConfig(
        vocab_size=128,
        image_token_offset=96,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=8,
        num_experts_per_tok=2,
        n_group=4,
        topk_group=2,
        first_k_dense_replace=1,
        block_length=8,
        mask_token_id=125,
        eos_token_id=126,
        pad_token_id=127,
    )
    torch._dynamo.reset()
    counters.clear()
    yield LLaDA2MoeForBlockDiffusion(config).eval()
    torch._dynamo.reset()


@torch.no_grad()
def hidden_states_of_blocks(model, ids: torch.Tensor) -> list[torch.Tensor]:
    """One step of every block, each behind the committed ones, as in `generate`; of four columns each."""
    length, block_length = ids.shape[1], model.config.block_length
    cache, columns_to_keep = BlockDiffusionCache(len(model.model.layers), length), torch.tensor([[0, 2, 5, 7]])
    found = []
    for start in range(0, length, block_length):
        outputs = model.model(
            input_ids=ids[:, start : start + block_length],
            position_ids=torch.arange(start, start + block_length)[None],
            past_key_values=cache,
            use_cache=False,
            columns_to_keep=columns_to_keep,
        )
        cache.commit(block_length)
        found.append(outputs.last_hidden_state)
    return found


@pytest.mark.parametrize("experts_implementation", ["grouped_mm", "batched_mm"])
def test_a_step_is_one_graph_at_any_length_of_the_prefix(model, experts_implementation):
    model.set_experts_implementation(experts_implementation)
    ids = torch.arange(10, 58)[None]
    wanted = hidden_states_of_blocks(model, ids)
    # "eager" runs what was captured as it is: what is tested is that all of it was, not the code that inductor writes.
    model.model.compile(fullgraph=True, backend="eager")
    torch.testing.assert_close(hidden_states_of_blocks(model, ids), wanted, rtol=1e-5, atol=1e-6)
    assert not counters["graph_break"]
    # The first block makes the buffers, and has a graph of its own; the length of the prefix is a variable.
    assert 1 <= counters["stats"]["unique_graphs"] <= 3
