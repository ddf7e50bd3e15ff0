"""A step of the backbone with the cache compiles as one graph, without breaks and not anew for every block."""

import pytest
import torch
from torch._dynamo.utils import counters

from tests.property_cases import tiny_backbone
from transformers_llada_uni.block_diffusion_cache import BlockDiffusionCache


BLOCK_LENGTH = 8


@pytest.fixture
def model():
    torch._dynamo.reset()
    counters.clear()
    yield tiny_backbone().float()
    torch._dynamo.reset()


@torch.no_grad()
def hidden_states_of_blocks(model, ids: torch.Tensor) -> list[torch.Tensor]:
    """One step of every block, each behind the committed ones, as in `generate`; of four columns each."""
    length = ids.shape[1]
    cache, columns_to_keep = BlockDiffusionCache(len(model.model.layers), length), torch.tensor([[0, 2, 5, 7]])
    found = []
    for start in range(0, length, BLOCK_LENGTH):
        outputs = model.model(
            input_ids=ids[:, start : start + BLOCK_LENGTH],
            position_ids=torch.arange(start, start + BLOCK_LENGTH)[None],
            past_key_values=cache,
            use_cache=False,
            block_length=BLOCK_LENGTH,
            columns_to_keep=columns_to_keep,
        )
        cache.commit(BLOCK_LENGTH)
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
