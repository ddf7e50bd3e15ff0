"""How often decoding waits for the device: what every read of a tensor's value would be on an accelerator."""

from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.transformers_llada_uni.generation.property_cases import tiny_backbone
from tests.transformers_llada_uni.generation.recorded_steps import recorded_on_cpu


READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::is_nonzero"}


class CountReads(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.name().split(".")[0] in READS
        return function(*args, **(kwargs or {}))

    def of_lists(self):
        """`tolist` is no operator on a CPU."""
        to_list = torch.Tensor.tolist

        def counted(tensor):
            self.count += 1
            return to_list(tensor)

        return mock.patch.object(torch.Tensor, "tolist", counted)


@pytest.fixture(scope="module")
def model():
    model = tiny_backbone().float()
    model.set_experts_implementation("grouped_mm")
    return model


def reads_and_forwards(model, is_guided: bool, **settings) -> tuple[int, int]:
    prompt = torch.arange(5, 21)[None]  # ends with a block, so that every block takes all steps
    settings = {"block_length": 8, "return_dict_in_generate": True} | settings
    with CountReads() as reads, reads.of_lists():
        if is_guided:
            output = model.generate_image_codes(
                prompt, (4, 8), negative_input_ids=prompt[:, :9], guidance_scale=2.0, **settings
            )
        else:
            output = model.generate(prompt, max_new_tokens=32, eos_token_id=[], **settings)
    return reads.count, output.num_forward_passes


@pytest.mark.parametrize("steps", [nullcontext, recorded_on_cpu], ids=["eager", "static"])
@pytest.mark.parametrize("is_guided", [False, True], ids=["text", "guided codes"])
def test_steps_of_a_schedule_never_wait_for_the_device(model, is_guided, steps):
    settings = {"threshold": 1.0, "use_cuda_graphs": False, "credit_alpha": 0.7}
    if is_guided:
        settings |= {"guidance_ramp": (0.0, 1.0)}
    with steps():
        few_reads, few_forwards = reads_and_forwards(model, is_guided, num_steps_per_block=2, **settings)
        many_reads, many_forwards = reads_and_forwards(model, is_guided, num_steps_per_block=8, **settings)
    assert many_forwards > 3 * few_forwards - 2
    assert many_reads == few_reads  # those of the blocks


@pytest.mark.parametrize("steps", [nullcontext, recorded_on_cpu], ids=["eager", "static"])
@pytest.mark.parametrize("is_guided", [False, True], ids=["text", "guided codes"])
def test_steps_that_may_end_a_block_early_ask_once(model, is_guided, steps):
    settings = {"threshold": 0.99, "use_cuda_graphs": False, "remasking_threshold": 0.5}
    with steps():
        few_reads, few_forwards = reads_and_forwards(model, is_guided, num_steps_per_block=2, **settings)
        many_reads, many_forwards = reads_and_forwards(model, is_guided, num_steps_per_block=8, **settings)
    assert many_reads - few_reads == many_forwards - few_forwards > 0
