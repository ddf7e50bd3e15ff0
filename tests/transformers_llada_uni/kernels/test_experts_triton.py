"""Routed experts in Triton give what the formula gives: all kinds of weights, sizes that fit no tile, any routing."""

import pytest
import torch
from transformers import GptOssConfig
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, FP8Experts
from transformers.integrations.moe import (
    ALL_EXPERTS_FUNCTIONS,
    batched_mm_experts_forward,
    grouped_mm_experts_forward,
    use_experts_implementation,
)
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeExperts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from tests.transformers_llada_uni.kernels.common import DEVICE, DTYPES, IS_INTERPRETED, random
from transformers_llada_uni import LLaDA2MoeConfig
from transformers_llada_uni.kernels import experts_triton
from transformers_llada_uni.kernels.expert_weights import ExpertWeights, quantize_experts
from transformers_llada_uni.kernels.experts_dequantized import experts_one_by_one
from transformers_llada_uni.kernels.experts_kernels import order_pairs, sum_of_experts
from transformers_llada_uni.kernels.experts_triton import (
    triton_experts,
    triton_experts_forward,
    triton_fp8_experts_forward,
)


KINDS = ["plain", "float8", "int8", "int4"]
EXPERTS, TOP_K = 16, 4
# Hidden and intermediate size, columns that share a scale
SIZES = {"one tile": (64, 32, 16), "no multiple of a tile": (96, 96, 16), "several tiles": (128, 128, 64)}
ODD_SIZES = (77, 41)  # not for integers, which need whole groups
DTYPE = torch.float32 if IS_INTERPRETED else torch.bfloat16  # of what is not tried in all: compiling takes time
# Of the norm; half of a rounding of the output, and those on the way
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 6e-4}

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture
def no_gradients():
    with torch.no_grad():
        yield


def weights_of(kind, hidden, intermediate, group, dtype=torch.float32, experts=EXPERTS):
    gate_up = random(experts, 2 * intermediate, hidden, dtype=dtype, seed=1, scale=hidden**-0.5)
    down = random(experts, hidden, intermediate, dtype=dtype, seed=2, scale=intermediate**-0.5)
    sizes = {"group_size": group, "block_size": (2 * group, group)}
    return quantize_experts(gate_up, kind, parts=2, **sizes), quantize_experts(down, kind, **sizes)


def route(tokens, experts=EXPERTS, top_k=TOP_K, dtype=torch.float32, seed=3):
    scores = random(tokens, experts, seed=seed)
    weights, index = scores.softmax(dim=-1).topk(top_k)
    return index, weights.to(dtype)


def relative_error(found, wanted):
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def formula(states, gate_up, down, index, weights):
    return experts_one_by_one(states.double(), gate_up, down, index, weights.double())


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 5])
def test_equals_the_formula(kind, sizes, tokens):
    gate_up, down = weights_of(kind, *sizes, dtype=DTYPE, experts=6)
    states, routing = random(tokens, sizes[0], dtype=DTYPE), route(tokens, experts=6, top_k=2, dtype=DTYPE)
    found = triton_experts(states, gate_up, down, *routing)
    assert relative_error(found, formula(states, gate_up, down, *routing)) < TOLERANCE[DTYPE]


@pytest.mark.skipif(IS_INTERPRETED, reason="the interpreter knows float32 only")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_types(kind, dtype):
    gate_up, down = weights_of(kind, 128, 128, 64, dtype=dtype)
    states, routing = random(5, 128, dtype=dtype), route(5, dtype=dtype)
    found = triton_experts(states, gate_up, down, *routing)
    assert found.dtype == dtype
    assert relative_error(found, formula(states, gate_up, down, *routing)) < TOLERANCE[dtype]


@pytest.mark.parametrize("kind", ["plain", "float8"])
def test_odd_sizes(kind):
    """A last block of float8 is smaller than a block, and the blocks of `up` do not begin at a multiple of one."""
    hidden, intermediate = ODD_SIZES
    gate_up, down = weights_of(kind, hidden, intermediate, 16, dtype=DTYPE, experts=5)
    states, routing = random(9, hidden, dtype=DTYPE), route(9, experts=5, top_k=3, dtype=DTYPE)
    found = triton_experts(states, gate_up, down, *routing)
    assert relative_error(found, formula(states, gate_up, down, *routing)) < TOLERANCE[DTYPE]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [30, 100, 300])
def test_many_tokens_an_expert(kind, tokens):
    """Each row of the table of tiles, and more tokens than a tile has rows."""
    gate_up, down = weights_of(kind, 64, 32, 32 if kind == "int8" else 16, dtype=DTYPE, experts=4)
    states, routing = random(tokens, 64, dtype=DTYPE), route(tokens, experts=4, top_k=1, dtype=DTYPE)
    found = triton_experts(states, gate_up, down, *routing)
    assert relative_error(found, formula(states, gate_up, down, *routing)) < TOLERANCE[DTYPE]


@pytest.mark.parametrize("kind", KINDS)
def test_all_tokens_to_the_same_experts(kind):
    """Experts that nobody chose are not read: what they hold is not even a number."""
    gate_up, down = weights_of(kind, 64, 32, 16, experts=24)
    index = torch.tensor([[23, 0, 17, 5]], device=DEVICE).repeat(21, 1)  # so more than a tile has rows
    states, weights = random(21, 64), route(21)[1]
    wanted = formula(states, gate_up, down, index, weights)
    is_used = torch.zeros(24, dtype=torch.bool, device=DEVICE)
    is_used[index[0]] = True
    for part in (gate_up, down):
        poisoned = part.data if part.scales is None else part.scales
        poisoned[~is_used] = torch.nan
    assert relative_error(triton_experts(states, gate_up, down, index, weights), wanted) < TOLERANCE[torch.float32]


def test_an_expert_chosen_twice():
    gate_up, down = weights_of("plain", 64, 32, 16)
    index = torch.tensor([[3, 3, 7, 3], [0, 15, 0, 15]], device=DEVICE)
    states, weights = random(2, 64), route(2)[1]
    found = triton_experts(states, gate_up, down, index, weights)
    assert relative_error(found, formula(states, gate_up, down, index, weights)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("tokens", [1, 100, 700])
def test_pairs_are_sorted_by_expert_and_stay_in_order(tokens, index_dtype):
    """Up to more pairs than are looked at together; many are equal."""
    index = torch.randint(0, 12, (tokens, 8), generator=torch.Generator().manual_seed(0)).to(DEVICE, index_dtype)
    index[index == 5] = 6
    pairs, offsets = order_pairs(index, 13)
    experts, wanted_pairs = index.flatten().sort(stable=True)
    assert torch.equal(pairs.long(), wanted_pairs)
    assert torch.equal(offsets.long(), torch.searchsorted(experts.long(), torch.arange(14, device=DEVICE)))


@pytest.mark.parametrize("addend_dtype", [torch.float32, torch.bfloat16])
def test_sum_is_taken_in_float32(addend_dtype):
    outputs, addend = random(3 * 5, 70), random(3, 70, seed=1).to(addend_dtype)
    wanted = outputs.view(3, 5, 70).double().sum(dim=1)
    torch.testing.assert_close(sum_of_experts(outputs, 5).double(), wanted, rtol=1e-6, atol=1e-6)
    found = sum_of_experts(outputs, 5, addend)
    torch.testing.assert_close(found.double(), wanted + addend.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_addend(dtype):
    gate_up, down = weights_of("plain", 64, 32, 16, dtype=dtype)
    states, routing = random(5, 64, dtype=dtype), route(5, dtype=dtype)
    addend = random(5, 64, dtype=dtype, seed=9)
    found = triton_experts(states, gate_up, down, *routing, addend=addend)
    wanted = formula(states, gate_up, down, *routing) + addend.double()
    assert relative_error(found, wanted) < TOLERANCE[dtype]


def test_weights_of_the_router_may_be_wider():
    gate_up, down = weights_of("plain", 64, 32, 16)
    states, (index, weights) = random(5, 64), route(5)
    found = triton_experts(states, gate_up, down, index, weights.double())
    torch.testing.assert_close(found, triton_experts(states, gate_up, down, index, weights))


def test_views():
    """What is not contiguous, or begins anywhere in memory."""
    gate_up, down = weights_of("plain", 64, 32, 16)
    states, (index, weights) = random(6, 64), route(6)
    wanted = triton_experts(states, gate_up, down, index, weights, states)
    moved = random(6 * 64 + 1)[1:].view(6, 64).copy_(states)
    wide = torch.cat([states, states], dim=1)[:, :64]
    found = triton_experts(moved, gate_up, down, index.T.contiguous().T, weights.T.contiguous().T, wide)
    assert torch.equal(found, wanted)


def test_a_token_gets_the_same_bits_whoever_else_is_there():
    gate_up, down = weights_of("plain", 64, 32, 16)
    states, (index, weights) = random(9, 64), route(9)
    wanted = triton_experts(states, gate_up, down, index, weights)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    found = triton_experts(states[order], gate_up, down, index[order], weights[order])
    assert torch.equal(found, wanted[order])
    others = random(9, 64, seed=7)
    others[4] = states[4]
    assert torch.equal(triton_experts(others, gate_up, down, index, weights)[4], wanted[4])


def test_no_tokens():
    for experts in (glm_experts(), fp8_experts()):
        assert experts(random(0, 64), *route(0)).shape == (0, 64)
        assert experts(random(0, 64), *route(0), addend=random(0, 64)).shape == (0, 64)


def test_refuses_what_does_not_fit():
    gate_up, down = weights_of("plain", 64, 32, 16)
    states, (index, weights) = random(5, 64), route(5)
    for call in (
        lambda: triton_experts(states.double(), gate_up, down, index, weights),
        lambda: triton_experts(states[:, :48], gate_up, down, index, weights),
        lambda: triton_experts(states, gate_up, down.data[..., :16].contiguous(), index, weights),
        lambda: triton_experts(states, gate_up.data.half(), down, index, weights),
        lambda: triton_experts(states, quantize_experts(gate_up.data, "int8", group_size=16), down, index, weights),
        lambda: triton_experts(states, gate_up, down, index.float(), weights),
        lambda: triton_experts(states, gate_up, down, index, weights[:, :3]),
        lambda: triton_experts(states, gate_up, down, index, weights, states[:4]),
    ):
        with pytest.raises(AssertionError):
            call()


# As an implementation of transformers


def glm_experts(dtype=torch.float32):
    config = LLaDA2MoeConfig(
        hidden_size=64,
        moe_intermediate_size=32,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        n_group=4,
        topk_group=2,
    )
    config._experts_implementation = "triton"
    experts = Glm4MoeExperts(config).requires_grad_(False)
    gate_up, down = weights_of("plain", 64, 32, 16)
    experts.gate_up_proj.copy_(gate_up.data), experts.down_proj.copy_(down.data)
    return experts.to(DEVICE, dtype)


def fp8_experts(block=16):
    config = LLaDA2MoeConfig(hidden_size=64, moe_intermediate_size=32, num_experts=EXPERTS)
    config._experts_implementation = "triton"

    class Experts(FP8Experts):  # the decorator changes the class it gets
        pass

    experts_class = use_experts_implementation(experts_class=Experts, experts_interface=ALL_FP8_EXPERTS_FUNCTIONS)
    experts = experts_class(config=config, block_size=(block, block)).requires_grad_(False)
    gate_up, down = weights_of("plain", 64, 32, 16)
    for name, weight, parts in (("gate_up_proj", gate_up, 2), ("down_proj", down, 1)):
        quantized = quantize_experts(weight.data, "float8", block_size=(block, block), parts=parts)
        setattr(experts, name, torch.nn.Parameter(quantized.data, requires_grad=False))
        setattr(experts, f"{name}_scale_inv", torch.nn.Parameter(quantized.scales, requires_grad=False))
    return experts


@pytest.fixture
def others_called(monkeypatch):
    """The names of the implementations that stood in."""
    called = []

    def stand_in(name, forward):
        monkeypatch.setattr(experts_triton, name, lambda *args: called.append(name) or forward(*args))

    stand_in("grouped_mm_experts_forward", grouped_mm_experts_forward)
    stand_in("batched_mm_experts_forward", batched_mm_experts_forward)
    stand_in("fp8_grouped_mm_experts_forward", lambda self, states, *_: torch.zeros_like(states))
    return called


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_addend", [False, True])
def test_is_an_implementation_of_experts(others_called, dtype, has_addend):
    experts, states, routing = glm_experts(dtype), random(33, 64, dtype=dtype), route(33, dtype=dtype)
    assert ALL_EXPERTS_FUNCTIONS["triton"] is triton_experts_forward
    found = experts(states, *routing, **({"addend": states} if has_addend else {}))
    wanted = Glm4MoeExperts.forward.__wrapped__(experts.double(), states.double(), routing[0], routing[1].double())
    assert not others_called
    assert relative_error(found, wanted + states.double() if has_addend else wanted) < TOLERANCE[dtype]


@pytest.mark.parametrize("block", [16, 128])
def test_is_an_implementation_of_float8_experts(others_called, block):
    """Blocks smaller than the weight, as in the release, and larger, where gate and up have one of their own each."""
    experts, states, routing = fp8_experts(block), random(33, 64), route(33)
    assert ALL_FP8_EXPERTS_FUNCTIONS["triton"] is triton_fp8_experts_forward
    found = experts(states, *routing, addend=states)
    gate_up = ExpertWeights("float8", experts.gate_up_proj, experts.gate_up_proj_scale_inv, (block, block), parts=2)
    down = ExpertWeights("float8", experts.down_proj, experts.down_proj_scale_inv, (block, block))
    assert not others_called
    assert relative_error(found, formula(states, gate_up, down, *routing) + states) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    "reason", ["many tokens", "gradients", "expert parallelism", "another type", "another activation"]
)
def test_leaves_to_grouped_mm_what_is_not_for_it(others_called, monkeypatch, reason):
    experts = glm_experts()
    limit = experts_triton.MAX_PAIRS_PER_EXPERT["plain"] * EXPERTS // TOP_K
    tokens = limit + 1 if reason == "many tokens" else 7
    dtype = torch.float64 if reason == "another type" else torch.float32
    if reason == "many tokens" and not IS_INTERPRETED:
        dtype = torch.bfloat16  # torch's kernel on GPUs knows no other
    states, routing = random(tokens, 64, dtype=dtype), route(tokens, dtype=dtype)
    experts = experts.to(dtype)
    if reason == "expert parallelism":
        experts._is_expert_parallel = True
    if reason == "another activation":
        experts.act_fn = torch.nn.GELU()
    with torch.set_grad_enabled(reason == "gradients"):
        found = triton_experts_forward(experts, states, *routing, addend=states)
    assert others_called == [("batched" if dtype == torch.float64 else "grouped") + "_mm_experts_forward"]
    wanted = Glm4MoeExperts.forward.__wrapped__(experts, states, *routing) + states
    assert relative_error(found, wanted) < (1e-2 if dtype == torch.bfloat16 else 1e-5)


def test_leaves_experts_of_another_form_alone(others_called):
    config = GptOssConfig(hidden_size=64, intermediate_size=32, num_local_experts=EXPERTS)
    experts = GptOssExperts(config).requires_grad_(False).to(DEVICE)  # with biases, transposed, and another gate
    for weight in experts.parameters():
        weight.zero_()
    triton_experts_forward(experts, random(4, 64), *route(4))
    assert others_called == ["grouped_mm_experts_forward"]


@pytest.mark.parametrize("reason", ["gradients", "static scales", "another gate"])
def test_leaves_float8_of_another_form_alone(others_called, reason):
    experts = fp8_experts()
    if reason == "static scales":
        experts.activation_scheme = "static"
    if reason == "another gate":
        experts.swiglu_limit = 7.0
    with torch.set_grad_enabled(reason == "gradients"):
        found = experts(random(4, 64), *route(4), addend=random(4, 64))
    assert others_called == ["fp8_grouped_mm_experts_forward"]
    assert torch.equal(found, random(4, 64))


@pytest.mark.parametrize("make", [glm_experts, fp8_experts])
def test_is_one_node_of_a_compiled_graph(others_called, make):
    experts, states, routing = make(), random(5, 64), route(5)
    wanted = experts(states, *routing, addend=states)
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(states, *routing, addend=states), wanted)
    assert not others_called


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_can_be_recorded():
    experts, states, routing = glm_experts(torch.bfloat16), random(32, 64, dtype=torch.bfloat16), route(32)
    experts(states, *routing)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = experts(states, *routing)
    states.copy_(random(32, 64, dtype=torch.bfloat16, seed=5))
    for tensor, other in zip(routing, route(32, seed=6), strict=True):
        tensor.copy_(other)
    graph.replay()
    assert torch.equal(found, experts(states, *routing))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [32, 512])
def test_is_as_close_as_grouped_mm(dtype, tokens):
    gate_up, down = weights_of("plain", 512, 128, 16, dtype=dtype, experts=64)
    states, routing = random(tokens, 512, dtype=dtype), route(tokens, experts=64, top_k=8, dtype=dtype)
    wanted = formula(states, gate_up, down, *routing)
    config = LLaDA2MoeConfig(hidden_size=512, moe_intermediate_size=128, num_experts=64, num_experts_per_tok=8)
    experts = Glm4MoeExperts(config).to(DEVICE, dtype).requires_grad_(False)
    experts.gate_up_proj.copy_(gate_up.data), experts.down_proj.copy_(down.data)
    other = grouped_mm_experts_forward(experts, states, *routing)
    found = triton_experts(states, gate_up, down, *routing)
    assert relative_error(found, wanted) <= relative_error(other, wanted)
