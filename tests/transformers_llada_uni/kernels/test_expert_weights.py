"""Weights of experts in fewer bits: what they come back as, how far off they are, and what is refused."""

import pytest
import torch
import torch.nn.functional as F

from transformers_llada_uni.kernels import experts_dequantized
from transformers_llada_uni.kernels.expert_tiles import FLOAT32_TILES, TILES, Tile, choose_tiles
from transformers_llada_uni.kernels.expert_weights import ExpertWeights, quantize_experts
from transformers_llada_uni.kernels.experts_dequantized import experts_one_by_one, experts_together


EXPERTS, OUT_FEATURES, IN_FEATURES, GROUP = 3, 48, 128, 16


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize(
    ("kind", "stored"),
    [("int8", torch.randint(-127, 128, (EXPERTS, OUT_FEATURES, IN_FEATURES), generator=torch.Generator())),
     ("int4", torch.randint(-8, 8, (EXPERTS, OUT_FEATURES, IN_FEATURES), generator=torch.Generator()))],
)  # fmt: skip
@pytest.mark.parametrize("parts", [1, 2])
def test_what_has_few_bits_comes_back(kind, stored, parts):
    stored[..., ::GROUP] = -8 if kind == "int4" else 127  # the largest number of every group
    scales = 0.25 + torch.arange(EXPERTS * OUT_FEATURES * IN_FEATURES // GROUP).view(EXPERTS, OUT_FEATURES, -1)
    if kind == "int4":
        scales = scales * (-1) ** torch.arange(OUT_FEATURES)[:, None]
    weight = stored * scales.repeat_interleave(GROUP, dim=-1)
    weights = quantize_experts(weight, kind, group_size=GROUP, parts=parts)
    assert (weights.in_features, weights.out_features) == (IN_FEATURES, OUT_FEATURES)
    torch.testing.assert_close(weights.scales, scales.transpose(1, 2), rtol=1e-6, atol=0)
    torch.testing.assert_close(weights.dequantize(torch.float32), weight, rtol=1e-6, atol=0)


def test_four_bits_lie_in_halves():
    """The layout that is saved: a change of it must be seen here."""
    weight = torch.zeros(1, 1, 64)
    weight[..., 0], weight[..., 1], weight[..., 32], weight[..., 33] = -8, 5, -8, -2
    weights = quantize_experts(weight, "int4", group_size=32)
    assert weights.data.dtype == torch.uint8 and weights.data.shape == (1, 1, 32)
    assert weights.data[0, 0, :3].tolist() == [0x88, 0xE5, 0]
    assert weights.scales.tolist() == [[[1.0], [1.0]]]


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("shape", [(2, 64, 96), (2, 40, 50)])
def test_float8_has_a_scale_a_block_of_each_part(shape, parts):
    """Where a part is no multiple of a block, its last block is smaller, and the next part begins with a new one."""
    weight = normal(*shape)
    weights = quantize_experts(weight, "float8", block_size=(16, 32), parts=parts)
    experts, rows, columns = shape
    limit = torch.finfo(torch.float8_e4m3fn).max
    scales = []
    for part in weight.chunk(parts, dim=1):
        blocks = [[b.abs().amax(dim=(1, 2)) / limit for b in r.split(32, dim=2)] for r in part.split(16, dim=1)]
        scales += [torch.stack(block_row, dim=-1) for block_row in blocks]
    torch.testing.assert_close(weights.scales, torch.stack(scales, dim=1))
    assert weights.data.dtype == torch.float8_e4m3fn and weights.data.shape == shape
    assert relative_error(weights.dequantize(torch.float32), weight) < 0.03


@pytest.mark.parametrize(("kind", "limit"), [("float8", 0.03), ("int8", 0.006), ("int4", 0.092)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_of_normal_weights(kind, limit, dtype):
    weight = normal(2, 64, 256).to(dtype)
    weights = quantize_experts(weight, kind, group_size=64, parts=2)
    assert weights.scales.dtype == (torch.float32 if kind == "float8" else dtype)
    assert relative_error(weights.dequantize(torch.float32), weight) < limit
    assert weights.dequantize(dtype).dtype == dtype


@pytest.mark.parametrize("sign", [1, -1])
def test_four_bits_reach_further_on_the_side_that_needs_it(sign):
    weight = sign * torch.tensor([8.0, 3, -7, 1]).repeat(8)[None, None]
    weights = quantize_experts(weight, "int4", group_size=16)
    assert torch.equal(weights.dequantize(torch.float32), weight)


@pytest.mark.parametrize("kind", ["float8", "int8", "int4"])
def test_zeros(kind):
    weights = quantize_experts(torch.zeros(1, 32, 64), kind, group_size=32, block_size=(16, 32))
    assert not weights.dequantize(torch.float32).any()


@pytest.mark.parametrize("kind", ["plain", "float8", "int8", "int4"])
def test_one_expert_of_many(kind):
    weights = quantize_experts(normal(3, 32, 64), kind, group_size=32, block_size=(16, 32), parts=2)
    found = weights.of_experts(1, 2)
    assert torch.equal(found.dequantize(torch.float32)[0], weights.dequantize(torch.float32)[1])
    assert found.data.data_ptr() == weights.data[1].data_ptr()


def test_bytes():
    plain = normal(2, 256, 256)
    assert quantize_experts(plain, "plain").nbytes == 4 * plain.numel()
    assert quantize_experts(plain, "float8").nbytes == plain.numel() + 2 * 2 * 2 * 4
    assert quantize_experts(plain, "int8", scale_dtype=torch.bfloat16).nbytes == plain.numel() * (1 + 2 / 64)
    assert quantize_experts(plain, "int4", scale_dtype=torch.bfloat16).nbytes == plain.numel() * (1 / 2 + 2 / 64)


@pytest.mark.parametrize("experts", [experts_one_by_one, experts_together])
@pytest.mark.parametrize("kind", ["plain", "float8", "int8", "int4"])
def test_experts(kind, experts, monkeypatch):
    monkeypatch.setattr(experts_dequantized, "SLICE", 3)
    gate_up = quantize_experts(normal(4, 64, 64), kind, group_size=16, block_size=(16, 16), parts=2)
    down = quantize_experts(normal(4, 64, 32, seed=1), kind, group_size=16, block_size=(16, 16))
    dtype = torch.float64 if experts is experts_one_by_one else torch.float32  # grouped products know no float64
    states = normal(5, 64, seed=2).to(dtype).requires_grad_()
    index = torch.tensor([[0, 1], [3, 0], [1, 1], [0, 3], [3, 1]])  # nobody takes 2
    weights = torch.rand(5, 2, generator=torch.Generator().manual_seed(3)).to(dtype).requires_grad_()
    found = experts(states, gate_up, down, index, weights)
    gate, up = torch.einsum("th,ekh->tek", states, gate_up.dequantize(dtype)).chunk(2, dim=-1)
    outputs = torch.einsum("tei,ehi->teh", F.silu(gate) * up, down.dequantize(dtype))
    wanted = (outputs[torch.arange(5)[:, None], index] * weights[..., None]).sum(dim=1)
    tolerance = {"rtol": 1e-6, "atol": 1e-5} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-3}
    torch.testing.assert_close(found, wanted, **tolerance)
    found_gradients, wanted_gradients = (
        torch.autograd.grad(output.square().sum(), (states, weights)) for output in (found, wanted)
    )
    for ours, theirs in zip(found_gradients, wanted_gradients, strict=True):
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_experts_together_under_autocast(kind):
    gate_up, down = (quantize_experts(normal(4, *sizes), kind, group_size=16) for sizes in ((64, 64), (64, 32)))
    states = normal(5, 64, seed=2).requires_grad_()
    index, weights = torch.tensor([[0, 1], [3, 0], [1, 2], [0, 3], [3, 1]]), torch.full((5, 2), 0.5)
    wanted = experts_together(states, gate_up, down, index, weights)
    with torch.autocast("cpu", torch.bfloat16):
        found = experts_together(states, gate_up, down, index, weights)
    assert found.dtype == torch.float32 and not torch.equal(found, wanted)
    (gradient,) = torch.autograd.grad(found.sum(), states)
    (exact,) = torch.autograd.grad(wanted.sum(), states)
    for ours, theirs in ((found, wanted), (gradient, exact)):
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_names_what_does_not_fit():
    weight = normal(2, 32, 64)
    with pytest.raises(ValueError, match="`kind` must be plain, float8, int8 or int4, got 'int3'"):
        quantize_experts(weight, "int3")
    with pytest.raises(ValueError, match="`weight` must be \\(experts, out_features, in_features\\)"):
        quantize_experts(weight[0], "int8")
    with pytest.raises(ValueError, match="`weight` holds values that are infinite"):
        quantize_experts(torch.full((1, 16, 16), torch.nan), "int8", group_size=16)
    with pytest.raises(ValueError, match="`group_size` must have a power of two of at least 16 columns, got 24"):
        quantize_experts(weight, "int8", group_size=24)
    with pytest.raises(ValueError, match="`group_size` must divide half of the 64 columns of int4 weights, got 64"):
        quantize_experts(weight, "int4", group_size=64)
    for arguments in (("int8", weight), ("plain", weight.transpose(1, 2)), ("int8", weight.to(torch.int8))):
        with pytest.raises(AssertionError):
            ExpertWeights(*arguments, scale_shape=(1, 32))


def test_tables_of_tiles_serve_every_number_of_pairs():
    for table in (*TILES.values(), FLOAT32_TILES):
        limits = [limit for limit, *_ in table]
        assert limits == sorted(limits) and limits[-1] == float("inf")
        for _, *tiles in table:
            for tile in tiles:
                assert all(size >= 16 and size & (size - 1) == 0 for size in (tile.rows, tile.columns, tile.reduction))


def test_tiles_are_cut_down_to_what_is_there(monkeypatch):
    monkeypatch.setitem(TILES, "plain", [(1, Tile(16, 64, 128, 4, 4), Tile(16, 128, 64, 4, 4)), (9, None, None)])
    gate_up, down = (ExpertWeights("plain", torch.empty(8, *shape)) for shape in ((48, 100), (100, 24)))
    large = 1 << 20
    assert choose_tiles(gate_up, down, torch.bfloat16, 8, large) == (Tile(16, 32, 128, 4, 4), Tile(16, 128, 32, 4, 4))
    gate_up, down = (ExpertWeights("plain", torch.empty(8, *shape)) for shape in ((512, 512), (512, 256)))
    # A stage of gate and up: 16 states and 2 x 64 weights, of 128 x 4 bytes (these weights are float32).
    stage = 128 * (16 * 2 + 2 * 64 * 4)
    assert choose_tiles(gate_up, down, torch.bfloat16, 8, 3 * stage)[0].stages == 3
    assert choose_tiles(gate_up, down, torch.bfloat16, 8, 3 * stage - 1)[0].stages == 2


def test_tiles_of_scaled_weights_have_one_scale_a_row():
    gate_up = quantize_experts(normal(2, 256, 256), "int4", group_size=32, parts=2)
    down = quantize_experts(normal(2, 256, 128), "int4", group_size=16)
    for num_pairs in (1, 32, 1000):
        tiles = choose_tiles(gate_up, down, torch.bfloat16, num_pairs, 1 << 20)
        assert [tile.reduction for tile in tiles] == [32, 16]
