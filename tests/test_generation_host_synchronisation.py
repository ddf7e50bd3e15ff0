"""How often decoding waits for the device: what every read of a tensor's value would be on an accelerator."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from transformers_llada_uni import LLaDA2MoeConfig, LLaDA2MoeForBlockDiffusion


READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::is_nonzero"}


class CountReads(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.name().split(".")[0] in READS
        return function(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
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
    model = LLaDA2MoeForBlockDiffusion(config).eval()
    model.set_experts_implementation("grouped_mm")
    return model


def reads_and_forwards(model, is_guided: bool, **settings) -> tuple[int, int]:
    prompt = torch.arange(5, 21)[None]  # ends with a block, so that every block takes all steps
    settings = {"block_length": 8, "return_dict_in_generate": True} | settings
    with CountReads() as reads:
        if is_guided:
            output = model.generate_image_codes(
                prompt, (4, 8), negative_input_ids=prompt[:, :9], guidance_scale=2.0, **settings
            )
        else:
            output = model.generate(prompt, max_new_tokens=32, eos_token_id=[], **settings)
    return reads.count, output.num_forward_passes


@pytest.mark.parametrize("is_guided", [False, True], ids=["text", "guided codes"])
def test_steps_of_a_schedule_never_wait_for_the_device(model, is_guided):
    few_reads, few_forwards = reads_and_forwards(model, is_guided, num_steps_per_block=2, threshold=1.0)
    many_reads, many_forwards = reads_and_forwards(model, is_guided, num_steps_per_block=8, threshold=1.0)
    assert many_forwards > 3 * few_forwards
    assert many_reads == few_reads  # those of the blocks


@pytest.mark.parametrize("is_guided", [False, True], ids=["text", "guided codes"])
def test_steps_that_may_end_a_block_early_ask_once(model, is_guided):
    few_reads, few_forwards = reads_and_forwards(model, is_guided, num_steps_per_block=2, threshold=0.99)
    many_reads, many_forwards = reads_and_forwards(model, is_guided, num_steps_per_block=8, threshold=0.99)
    assert many_reads - few_reads == many_forwards - few_forwards > 0
