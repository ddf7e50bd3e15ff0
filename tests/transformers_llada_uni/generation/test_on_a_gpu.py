"""Recorded steps as CUDA graphs, where there is a GPU; `test_recorded.py` has what a CPU can show."""

import pytest
import torch

from tests.transformers_llada_uni.generation.property_cases import tiny_backbone
from tests.transformers_llada_uni.generation.test_recorded import KINDS, TEXT, call
from transformers_llada_uni.generation import recording
from transformers_llada_uni.generation.recording import recordings_of


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def model_on(device: str):
    model = tiny_backbone().float().to(device)
    model.set_experts_implementation("triton")
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_recorded_steps_give_the_same_tokens(kind):
    model = model_on("cuda")
    wanted = call(model, kind, use_cache=False)
    for _ in range(3):
        assert torch.equal(call(model, kind, use_cuda_graphs=True), wanted)
    assert any(buffers._graphs for buffers in recordings_of(model.model)._kept.values())


def test_a_broken_recording_leaves_the_device_as_it_was():
    pool, tensor = recording.GraphPool(), torch.zeros(3, device="cuda")
    with pytest.raises(RuntimeError):
        recording.CudaGraph(lambda: tensor.sum().item(), pool)
    assert torch.rand(3, device="cuda").shape == (3,)
    pool.renew()
    graph = recording.CudaGraph(lambda: tensor.add_(1), pool)
    graph.replay()
    assert tensor.tolist() == [1, 1, 1]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_second_gpu():
    wanted = model_on("cuda:0").generate(**TEXT | {"input_ids": TEXT["input_ids"].to("cuda:0")})
    model = model_on("cuda:1")
    for _ in range(3):
        found = model.generate(**TEXT | {"input_ids": TEXT["input_ids"].to("cuda:1")})
        assert torch.equal(found.cpu(), wanted.cpu())


def test_sampling_where_algorithms_have_to_be_deterministic(monkeypatch):
    """torch's cumulative sum is not, on CUDA, and raises; cuBLAS asks for a workspace of fixed size."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    model, kind = model_on("cuda"), "sampled text, a generator for each row"
    wanted = call(model, kind, use_cache=False)
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(3):
            assert torch.equal(call(model, kind), wanted)
    finally:
        torch.use_deterministic_algorithms(False)
