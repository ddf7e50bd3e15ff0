"""Recorded steps as CUDA graphs, where there is a GPU; `test_recorded.py` has what a CPU can show."""

import pytest
import torch

from tests.transformers_llada_uni.generation.property_cases import tiny_backbone
from tests.transformers_llada_uni.generation.test_drafts import Recorder
from tests.transformers_llada_uni.generation.test_recorded import KINDS, PADDING, TEXT, call, ids_of
from tests.transformers_llada_uni.generation.test_stopping import StopsAfter
from transformers_llada_uni import LLaDA2MoeConfig, LLaDA2MoeForBlockDiffusion
from transformers_llada_uni.generation import recording
from transformers_llada_uni.generation.continuous_batch import ContinuousBatch
from transformers_llada_uni.generation.recording import recordings_of
from transformers_llada_uni.kernels.expert_weights import quantize_experts
from transformers_llada_uni.kernels.experts_dequantized import experts_one_by_one, experts_together
from transformers_llada_uni.kernels.groupwise_modules import GroupwiseWeights
from transformers_llada_uni.loading.quantization_groupwise import replace_with_groupwise_modules


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


def test_drafts_and_criteria_that_stop():
    model, shown = model_on("cuda"), []
    wanted = model.generate(**on_cuda(TEXT), use_cache=False)
    criterion = StopsAfter(wanted[0, 21 + 10 : 21 + 12].tolist())
    length = next(n for n in range(2, 31) if wanted[0, 21 + n - 2 : 21 + n].tolist() in criterion.endings)
    for _ in range(3):
        recorder = Recorder()
        found = model.generate(**on_cuda(TEXT), use_cuda_graphs=True, streamer=recorder)
        assert torch.equal(found, wanted)
        shown.append([(kind, value if value is None else value.tolist()) for kind, value in recorder.events])
        found = model.generate(**on_cuda(TEXT), use_cuda_graphs=True, stopping_criteria=[criterion])
        assert torch.equal(found, wanted[:, : 21 + length])
    assert shown[0] == shown[1] == shown[2]
    assert sum(kind == "draft" for kind, _ in shown[0]) > 4


def test_rows_that_come_and_go():
    model, settings = model_on("cuda"), {"block_length": 8, "num_steps_per_block": 4, "threshold": 0.3}
    prompts = [ids_of(length, seed=length) for length in (1, 3, 17, 33, 70)]
    batch = ContinuousBatch(model, max_new_tokens=20, **settings)
    rows = []
    for prompt in prompts:
        rows.append(batch.add(prompt))
        batch.step()
    while batch.rows:
        batch.step()
    for prompt, row in zip(prompts, rows, strict=True):
        alone = model.generate(prompt[None].cuda(), max_new_tokens=20, **settings)
        assert row.tokens == alone[0, len(prompt) :].tolist()


def test_flex_attention_with_left_padding():
    """Of prompts of 70 and 64, of which torch's kernel for short queries had no choice of tiles."""
    arguments = TEXT | {"input_ids": ids_of(2, 70), "attention_mask": torch.ones(2, 70, dtype=torch.long)}
    arguments["attention_mask"][1, :6] = 0
    model = model_of_a_width_for_kernels()
    wanted = model.generate(**on_cuda(arguments))
    model.set_attn_implementation("flex_attention")
    assert torch.equal(model.generate(**on_cuda(arguments)), wanted)


@pytest.mark.parametrize("kind", ["int4", "int8"])
@torch.no_grad()
def test_few_bits_are_recorded(kind):
    model = model_of_a_width_for_kernels()
    plain = dict(model.named_parameters())
    with torch.device("cuda"):
        replace_with_groupwise_modules(model, model.config, kind, group_size=32)
    for name, module in model.named_modules():
        if isinstance(module, GroupwiseWeights):
            for own_name in module.weight_names:
                for part, tensor in module.quantize(own_name, plain[f"{name}.{own_name}"]).items():
                    getattr(module, part).copy_(tensor)
    arguments = TEXT | {"input_ids": ids_of(2, 21), "attention_mask": PADDING, "threshold": 1.0}
    model.set_experts_implementation("eager")  # each expert that is used is made plain
    wanted = model.generate(**on_cuda(arguments), use_cache=False)
    model.set_experts_implementation("triton")
    for _ in range(3):
        assert torch.equal(model.generate(**on_cuda(arguments), use_cuda_graphs=True), wanted)
    assert recordings_of(model.model).num_bytes


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_gradients_through_experts_of_few_bits(kind):
    """A layer's experts together, in the products of GPUs, against one by one."""
    gate_up, down = (
        quantize_experts(torch.randn(8, *sizes, device="cuda"), kind, group_size=32, scale_dtype=torch.bfloat16)
        for sizes in ((128, 64), (64, 64))
    )
    states = torch.randn(40, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    index, weights = torch.rand(40, 8, device="cuda").topk(2).indices, torch.rand(40, 2, device="cuda")
    results = []
    for compute in (experts_one_by_one, experts_together):
        output = compute(states, gate_up, down, index, weights)
        results.append((output, *torch.autograd.grad(output.float().square().sum(), states)))
    for wanted, found in zip(*results, strict=True):
        assert (found - wanted).norm() < 0.02 * wanted.norm()


def on_cuda(arguments: dict) -> dict:
    return {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}


def model_of_a_width_for_kernels() -> LLaDA2MoeForBlockDiffusion:
    """In float32, with heads of 16 and rows that groups of 32 divide, half of them too."""
    torch.manual_seed(0)
    config = LLaDA2MoeConfig(
        **tiny_backbone().config.to_dict()
        | {"hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 64, "head_dim": 16}
    )
    return LLaDA2MoeForBlockDiffusion(config).float().cuda().eval()
