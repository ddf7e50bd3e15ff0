"""In which step each token was committed."""

import pytest
import torch

from tests.transformers_llada_uni.generation.recorded_steps import TracedProgram, recorded_on_cpu
from tests.transformers_llada_uni.training.training_common import BLOCK, MASK, tiny_model


SETTINGS = {"max_new_tokens": 9, "return_dict_in_generate": True, "output_trajectory": True, "threshold": 0.05}
INPUT_IDS = torch.tensor([[59, 59, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6, 8], [59, 59, 59, 59, 9, 8, 7]])
ATTENTION_MASK = (INPUT_IDS != 59).long()


@pytest.fixture(scope="module")
def model():
    model = tiny_model()
    model.lm_head.weight.data *= 8
    model.set_experts_implementation("batched_mm")  # what is recorded
    return model


@pytest.mark.parametrize("settings", [{}, {"use_cache": False}, {"do_sample": True}])
def test_a_row_in_a_batch_has_the_steps_of_the_row_alone(model, settings):
    """Its blocks are filled step by step, and what follows its end in the last one is there too."""
    ends = list(range(10, 16))
    settings = SETTINGS | {"eos_token_id": ends} | settings
    generators = [torch.Generator().manual_seed(row) for row in range(3)] if "do_sample" in settings else None
    outputs = model.generate(INPUT_IDS, attention_mask=ATTENTION_MASK, generator=generators, **settings)
    plain = SETTINGS | settings | {"return_dict_in_generate": False, "output_trajectory": False}
    generators = [torch.Generator().manual_seed(row) for row in range(3)] if "do_sample" in settings else None
    tokens = model.generate(INPUT_IDS, attention_mask=ATTENTION_MASK, generator=generators, **plain)
    assert torch.equal(outputs.sequences, tokens)
    ids, steps = outputs.trajectory.ids, outputs.trajectory.steps
    for row in range(3):
        prompt = INPUT_IDS[row][ATTENTION_MASK[row].bool()]
        generator = None if generators is None else torch.Generator().manual_seed(row)
        alone = model.generate(prompt[None], generator=generator, **settings)
        width = alone.trajectory.ids.shape[1]
        assert torch.equal(ids[row, :width], alone.trajectory.ids[0])
        assert torch.equal(steps[row, :width], alone.trajectory.steps[0])
        assert (ids[row, width:] == MASK).all() and (steps[row, width:] == -1).all()
        # Prompt, answer, and whole blocks of them.
        answer = alone.sequences[0, len(prompt) :]
        assert torch.equal(ids[row, : len(prompt)], prompt) and (steps[row, : len(prompt)] == -1).all()
        assert torch.equal(ids[row, len(prompt) : len(prompt) + len(answer)], answer)
        end = len(prompt) + len(answer)
        end += -end % BLOCK
        assert (steps[row, len(prompt) : end] >= 0).all() and (steps[row, end:] == -1).all()
        for block in steps[row, :end].split(BLOCK):
            taken = set(block.tolist()) - {-1}
            assert taken == set(range(len(taken)))  # each step commits


def test_recorded_steps_leave_the_same(model):
    """Where rows that have ended are computed along."""
    settings = SETTINGS | {"eos_token_id": list(range(10, 16))}
    eager = model.generate(INPUT_IDS, attention_mask=ATTENTION_MASK, **settings)
    with recorded_on_cpu():
        recorded = model.generate(INPUT_IDS, attention_mask=ATTENTION_MASK, use_cuda_graphs=True, **settings)
    model.release_cuda_graphs()
    assert TracedProgram.count > 0
    assert torch.equal(recorded.sequences, eager.sequences)
    assert torch.equal(recorded.trajectory.steps, eager.trajectory.steps)
    assert torch.equal(recorded.trajectory.ids, eager.trajectory.ids)


def test_a_trajectory_needs_an_output_to_be_in(model):
    with pytest.raises(ValueError, match="`output_trajectory=True` needs `return_dict_in_generate=True`"):
        model.generate(INPUT_IDS[:1], output_trajectory=True)
