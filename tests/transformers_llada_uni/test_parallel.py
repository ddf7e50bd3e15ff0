"""Two processes on a CPU (gloo) must compute what one does, under transformers' own parallelism."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import transformers_llada_uni  # noqa: F401  registers the model
from tests.forked import run_forked

from .parallel_worker import compute


@pytest.fixture(scope="module")
def single(official_tiny):
    model = AutoModelForCausalLM.from_pretrained(official_tiny)
    input_ids = torch.arange(48).view(2, 24)
    settings = {"block_length": 8, "num_steps_per_block": 4, "mask_token_id": 441}
    with torch.no_grad():
        outputs = model(input_ids, labels=input_ids, block_length=8)
    return {
        "logits": outputs.logits,
        "loss": outputs.loss.reshape(1),
        "text": model.generate(input_ids, max_new_tokens=12, **settings),
        "codes": model.generate_image_codes(input_ids, (3, 3), **settings),
    }


@pytest.mark.parametrize("sizes", [["tp_size=2"], ["tp_size=2", "ep_size=2"], ["fsdp_size=2"]], ids="-".join)
def test_two_processes_equal_one(official_tiny, single, tmp_path, sizes):
    output = tmp_path / "computed.safetensors"
    assert run_forked(compute, str(official_tiny), str(output), sizes, num_processes=2) == [0, 0]
    computed = load_file(output)
    torch.testing.assert_close(computed["logits"], single["logits"], rtol=0, atol=1e-4)
    torch.testing.assert_close(computed["loss"], single["loss"], rtol=0, atol=1e-4)
    assert torch.equal(computed["text"], single["text"])
    assert torch.equal(computed["codes"], single["codes"])
