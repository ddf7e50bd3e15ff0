"""A step of the backbone with the cache compiles as one graph, without breaks and not anew for every block or step."""

import pytest
import torch
from torch._dynamo.utils import counters

from tests.transformers_llada_uni.generation.property_cases import tiny_backbone
from transformers_llada_uni.generation.cache import BlockDiffusionCache


BLOCK_LENGTH = 8


@pytest.fixture(autouse=True)
def nothing_is_compiled():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def model():
    return tiny_backbone().float()


@torch.no_grad()
def hidden_states_of_blocks(model, ids: torch.Tensor) -> list[torch.Tensor]:
    """One step of every block, each behind the committed ones, as in `generate`; of four columns each."""
    length = ids.shape[1]
    cache, positions_to_keep = BlockDiffusionCache(len(model.model.layers), length), torch.tensor([[0, 2, 5, 7]])
    found = []
    for start in range(0, length, BLOCK_LENGTH):
        outputs = model.model(
            input_ids=ids[:, start : start + BLOCK_LENGTH],
            position_ids=torch.arange(start, start + BLOCK_LENGTH)[None],
            past_key_values=cache,
            use_cache=False,
            block_length=BLOCK_LENGTH,
            positions_to_keep=positions_to_keep,
        )
        cache.commit(BLOCK_LENGTH)
        found.append(outputs.last_hidden_state)
    return found


@pytest.mark.parametrize("experts_implementation", ["grouped_mm", "batched_mm", "fused_gather"])
def test_a_step_is_one_graph_at_any_length_of_the_prefix(model, experts_implementation):
    model.set_experts_implementation(experts_implementation)
    ids = torch.arange(10, 58)[None]
    wanted = hidden_states_of_blocks(model, ids)
    counters.clear()  # fused_gather has compiled its loops
    # "eager" runs what was captured as it is: what is tested is that all of it was, not the code that inductor writes.
    model.model.compile(fullgraph=True, backend="eager")
    torch.testing.assert_close(hidden_states_of_blocks(model, ids), wanted, rtol=1e-5, atol=1e-6)
    assert not counters["graph_break"]
    # The first block makes the buffers, and has a graph of its own; the length of the prefix is a variable.
    assert 1 <= counters["stats"]["unique_graphs"] <= 3


def test_generate_takes_one_graph_for_the_prompt_and_two_for_all_steps(model):
    model.set_experts_implementation("grouped_mm")
    arguments = {"input_ids": torch.arange(10, 34)[None], "eos_token_id": []}
    arguments |= {"block_length": BLOCK_LENGTH, "num_steps_per_block": 4, "threshold": 1.0}
    wanted = {length: model.generate(max_new_tokens=length, **arguments) for length in (24, 40, 56)}
    model.model.compile(fullgraph=True, backend="eager")
    num_graphs = []
    for length, tokens in wanted.items():
        assert torch.equal(model.generate(max_new_tokens=length, **arguments), tokens)
        num_graphs.append(counters["stats"]["unique_graphs"])
    # The first step of a block takes the block before it along. How many columns are kept, and how many tokens stand
    # before, are variables; so is the length of the buffers, but the prompt's graph, which makes them, learns it late.
    assert not counters["graph_break"]
    assert num_graphs == [3, 4, 4]


def test_all_kinds_of_calls_in_one_process():
    """Each kind, of one row or several, padded, guided, has graphs of its own: more than dynamo's limit of eight."""
    model = tiny_backbone(num_hidden_layers=1, first_k_dense_replace=0).float()  # every layer is traced in every graph
    model.set_experts_implementation("grouped_mm")
    settings = {"num_steps_per_block": 4, "threshold": 1.0}
    ids = torch.arange(10, 82).view(3, 24)
    padding = torch.ones_like(ids)
    padding[0, :8] = 0

    def calls() -> list[torch.Tensor]:
        text = {"eos_token_id": [], "block_length": BLOCK_LENGTH, "max_new_tokens": 24, **settings}
        guided = {"grid": (4, 4), "negative_input_ids": ids[:1], "guidance_scale": 2.0, **settings}
        return [
            model.generate(ids[:1], **text),
            model.generate_image_codes(ids[:1], **guided),
            model.generate_image_codes(ids[:2], **guided | {"negative_input_ids": ids[1:]}),
            model.generate(ids[:2], **text),
            model.generate(ids, attention_mask=padding, **text),
            model.generate(ids, **text),
            model.generate_image_codes(ids[:1], (4, 4), **settings),
        ]

    wanted = calls()
    model.model.compile(fullgraph=True, backend="eager", isolate_recompiles=True, recompile_limit=64)
    for found, tokens in zip(calls(), wanted, strict=True):
        assert torch.equal(found, tokens)
    assert not counters["graph_break"]
    assert 8 < counters["stats"]["unique_graphs"] < 32
