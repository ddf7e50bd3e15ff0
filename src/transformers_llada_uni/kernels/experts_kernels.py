"""
The four launches of routed experts: order pairs by expert; gate, up and SiLU; down; sum over the experts of a token.

A *pair* is a token and one of its `top_k` experts: pair `p` is of token `p // top_k`. Pairs are put in the order of
their experts. A program of the two products owns some rows of one expert's weight, walks the pairs of that expert a
tile at a time, and ends at once where there are none. So a weight that is used is read once if the pairs of its expert
fit one tile, one that is not used is not read, and the grid depends on shapes alone.
"""

import torch
import triton
import triton.language as tl

from .expert_tiles import Tile
from .expert_weights import ExpertWeights


# Pairs that a program of `order_pairs` looks at together; two sizes, so that two kernels serve all numbers of tokens.
BLOCK_OF_FEW_PAIRS, BLOCK_OF_MANY_PAIRS = 512, 4096
BLOCK_OF_SUM = 1024  # channels


def order_pairs(top_k_index: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Args:
        top_k_index: `(tokens, top_k)`, contiguous, at least one; each from 0 to `num_experts - 1`.

    Returns:
        `pairs` `(tokens * top_k,)` and `offsets` `(num_experts + 1,)`, int32: those of expert `e` are
        `pairs[offsets[e] : offsets[e + 1]]`, in the order of tokens.
    """
    num_pairs = top_k_index.numel()
    pairs = torch.empty(num_pairs, dtype=torch.int32, device=top_k_index.device)
    offsets = torch.empty(num_experts + 1, dtype=torch.int32, device=top_k_index.device)
    is_few = num_pairs <= BLOCK_OF_FEW_PAIRS
    _order_pairs_kernel[(num_experts,)](
        top_k_index,
        pairs,
        offsets,
        num_pairs,
        num_experts,
        BLOCK_OF_FEW_PAIRS if is_few else BLOCK_OF_MANY_PAIRS,
        num_warps=4 if is_few else 8,
    )
    return pairs, offsets


def gate_and_up(
    states: torch.Tensor, weights: ExpertWeights, pairs: torch.Tensor, offsets: torch.Tensor, tile: Tile
) -> torch.Tensor:
    """
    `silu(gate(x)) * up(x)` for every pair, in the order of `pairs`.

    Args:
        states: `(tokens, hidden_size)`, contiguous.
        weights: `(experts, 2 * intermediate_size, hidden_size)`, rows of the gate first.

    Returns:
        `(pairs, intermediate_size)`.
    """
    output = states.new_empty(len(pairs), weights.out_features // 2)
    _multiply(states, weights, None, output, pairs, offsets, tile)
    return output


def down(
    states: torch.Tensor,
    weights: ExpertWeights,
    top_k_weights: torch.Tensor,
    pairs: torch.Tensor,
    offsets: torch.Tensor,
    tile: Tile,
) -> torch.Tensor:
    """
    Every pair's output times what the router weighs it with, in the order of tokens.

    Args:
        states: `(pairs, intermediate_size)`, in the order of `pairs`.
        weights: `(experts, hidden_size, intermediate_size)`.
        top_k_weights: `(tokens, top_k)`, contiguous.

    Returns:
        `(pairs, hidden_size)`.
    """
    output = states.new_empty(len(pairs), weights.out_features)
    _multiply(states, weights, top_k_weights, output, pairs, offsets, tile)
    return output


def _multiply(
    states: torch.Tensor,
    weights: ExpertWeights,
    top_k_weights: torch.Tensor | None,
    output: torch.Tensor,
    pairs: torch.Tensor,
    offsets: torch.Tensor,
    tile: Tile,
) -> None:
    out_features = output.shape[1]
    _product_kernel[(triton.cdiv(out_features, tile.columns), len(weights.data))](
        states,
        weights.data,
        weights.data if weights.scales is None else weights.scales,  # not read for plain weights
        top_k_weights,
        output,
        pairs,
        offsets,
        len(pairs) // len(states),
        out_features,
        weights.in_features,
        weights.kind,
        *weights.scale_shape,
        *weights.scale_strides(),
        precision_of(states),
        tile.rows,
        tile.columns,
        tile.reduction,
        num_stages=tile.stages,
        num_warps=tile.warps,
    )


def sum_of_experts(expert_outputs: torch.Tensor, top_k: int, addend: torch.Tensor | None = None) -> torch.Tensor:
    """
    The sum over the experts of a token and, if given, `addend`: in float32, always in the same order.

    Args:
        expert_outputs: `(tokens * top_k, hidden_size)`, in the order of tokens.
        addend: `(tokens, hidden_size)`, contiguous.

    Returns:
        `(tokens, hidden_size)`.
    """
    num_pairs, hidden_size = expert_outputs.shape
    output = expert_outputs.new_empty(num_pairs // top_k, hidden_size)
    block = min(BLOCK_OF_SUM, triton.next_power_of_2(hidden_size))
    _sum_kernel[(num_pairs // top_k, triton.cdiv(hidden_size, block))](
        expert_outputs, addend, output, top_k, hidden_size, block, num_warps=4
    )
    return output


def precision_of(states: torch.Tensor) -> str:
    return "ieee" if states.dtype == torch.float32 else "tf32"  # the latter says nothing of half precision


@triton.jit(do_not_specialize=["num_pairs"])
def _order_pairs_kernel(top_k_index, pairs, offsets, num_pairs, NUM_EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    """A program an expert counts the pairs of the experts before it, then puts its own behind them."""
    expert = tl.program_id(0)
    place = tl.arange(0, BLOCK)
    is_before = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, num_pairs, BLOCK):
        chosen = tl.load(top_k_index + start + place, mask=start + place < num_pairs, other=NUM_EXPERTS)
        is_before += (chosen < expert).to(tl.int32)
    end = tl.sum(is_before, axis=0)
    tl.store(offsets + expert, end)
    for start in range(0, num_pairs, BLOCK):
        chosen = tl.load(top_k_index + start + place, mask=start + place < num_pairs, other=NUM_EXPERTS)
        is_own = (chosen == expert).to(tl.int32)
        rank = tl.cumsum(is_own, axis=0)
        tl.store(pairs + end + rank - 1, start + place, mask=is_own > 0)
        end += tl.sum(is_own, axis=0)
    if expert == NUM_EXPERTS - 1:
        tl.store(offsets + NUM_EXPERTS, end)


# Four bytes to two times four numbers in half precision. With as few operations as can be, since with four bits they
# are the limit, where it is the memory otherwise: a four-bit number with its sign bit flipped, as the lowest bits of
# 128 (of 1024 in float16), is that number and 136 (1032) more.
_UNPACK = """
{{
.reg .b32 low, high, one, less;
lop3.b32 low, $4, 0x0F0F0F0F, 0x08080808, 0x6A;  // (a & b) ^ c
shr.b32 high, $4, 4;
lop3.b32 high, high, 0x0F0F0F0F, 0x08080808, 0x6A;
mov.b32 one, {one};
mov.b32 less, {less};
prmt.b32 $0, low, {large}, 0x4140;
prmt.b32 $1, low, {large}, 0x4342;
prmt.b32 $2, high, {large}, 0x4140;
prmt.b32 $3, high, {large}, 0x4342;
fma.rn.{type} $0, $0, one, less;
fma.rn.{type} $1, $1, one, less;
fma.rn.{type} $2, $2, one, less;
fma.rn.{type} $3, $3, one, less;
}}
"""
_UNPACK_TO_BFLOAT16 = tl.constexpr(
    _UNPACK.format(type="bf16x2", large="0x43434343", one="0x3F803F80", less="0xC308C308")
)
_UNPACK_TO_FLOAT16 = tl.constexpr(
    _UNPACK.format(type="f16x2", large="0x64646464", one="0x3C003C00", less="0xE408E408")
)


@triton.jit
def _unpacked(tile, dtype: tl.constexpr):
    """The lower and the upper four bits of a tile, as two tiles of numbers."""
    if dtype == tl.bfloat16:
        low, high = tl.inline_asm_elementwise(
            _UNPACK_TO_BFLOAT16, "=&r,=&r,=&r,=&r,r", [tile], (tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    elif dtype == tl.float16:
        low, high = tl.inline_asm_elementwise(
            _UNPACK_TO_FLOAT16, "=&r,=&r,=&r,=&r,r", [tile], (tl.float16, tl.float16), is_pure=True, pack=4
        )
    else:
        low = ((tile & 15) ^ 8).to(dtype) - 8
        high = ((tile >> 4) ^ 8).to(dtype) - 8
    return low, high


@triton.jit
def _add_product(
    total,  # (rows, columns), float32
    states,  # (rows, reduction)
    states_of_high,  # the same for the upper four bits of int4; else not used
    weight,  # pointers, (reduction, columns)
    weight_mask,
    scales,  # pointers, (columns or 1,)
    scales_of_high,
    scale_mask,
    KIND: tl.constexpr,
    IS_EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """
    Adds the product of a tile of states and a tile of weights, which is brought into the type of the states. All
    weights of one row in the tile share a scale, so scales multiply the product, and no weight is rounded again.
    """
    tile = tl.load(weight) if IS_EVEN else tl.load(weight, mask=weight_mask, other=0.0)
    if KIND == "plain":
        total = tl.dot(states, tile, total, input_precision=PRECISION)
    elif KIND == "int4":
        low, high = _unpacked(tile, states.dtype)
        scale = tl.load(scales, mask=scale_mask, other=0.0).to(tl.float32)
        scale_of_high = tl.load(scales_of_high, mask=scale_mask, other=0.0).to(tl.float32)
        total += tl.dot(states, low, input_precision=PRECISION) * scale[None, :]
        total += tl.dot(states_of_high, high, input_precision=PRECISION) * scale_of_high[None, :]
    else:
        if KIND == "float8":
            tile = tile.to(tl.float16)  # exact
            if states.dtype == tl.bfloat16:
                tile = tile.to(tl.float32)  # straight to bfloat16 is an instruction of a quarter of the rate
        scale = tl.load(scales, mask=scale_mask, other=0.0).to(tl.float32)
        total += tl.dot(states, tile.to(states.dtype), input_precision=PRECISION) * scale[None, :]
    return total


@triton.jit
def _product_kernel(
    states,
    weight,
    scales,
    top_k_weights,  # `None` for gate and up
    output,
    pairs,
    offsets,
    TOP_K: tl.constexpr,
    OUT_FEATURES: tl.constexpr,
    IN_FEATURES: tl.constexpr,
    KIND: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
    SCALE_STRIDE_EXPERT: tl.constexpr,
    SCALE_STRIDE_ROW: tl.constexpr,
    SCALE_STRIDE_COLUMN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_REDUCTION: tl.constexpr,
):
    """Gate and up: from tokens to pairs, with as many rows of `up` behind those of the gate. Down: from pairs on."""
    IS_GATED: tl.constexpr = top_k_weights is None
    # Two columns of an int4 weight are one byte, from the first and from the second half.
    STORED: tl.constexpr = IN_FEATURES // 2 if KIND == "int4" else IN_FEATURES
    IS_EVEN: tl.constexpr = STORED % BLOCK_REDUCTION == 0 and OUT_FEATURES % BLOCK_COLUMNS == 0
    SCALES_TO_HIGH: tl.constexpr = STORED // SCALE_COLUMNS * SCALE_STRIDE_COLUMN
    SCALES_TO_UP: tl.constexpr = (OUT_FEATURES + SCALE_ROWS - 1) // SCALE_ROWS * SCALE_STRIDE_ROW
    NUM_SCALES: tl.constexpr = 1 if SCALE_ROWS % BLOCK_COLUMNS == 0 else BLOCK_COLUMNS
    expert = tl.program_id(1)
    first, last = tl.load(offsets + expert), tl.load(offsets + expert + 1)
    first_column = tl.program_id(0) * BLOCK_COLUMNS
    column = first_column + tl.arange(0, BLOCK_COLUMNS)
    scaled_column = first_column + tl.arange(0, NUM_SCALES)
    has_column, has_scale = column < OUT_FEATURES, scaled_column < OUT_FEATURES
    reduction = tl.arange(0, BLOCK_REDUCTION)
    weight += expert.to(tl.int64) * ((2 if IS_GATED else 1) * OUT_FEATURES * STORED)
    row_weight = weight + column[None, :] * STORED + reduction[:, None]
    row_scales = scales + expert * SCALE_STRIDE_EXPERT + scaled_column // SCALE_ROWS * SCALE_STRIDE_ROW

    for start in range(first, last, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        has_row = row < last
        pair = tl.load(pairs + row, mask=has_row, other=0)
        source, target = (pair // TOP_K, row) if IS_GATED else (row, pair)
        row_states = states + source.to(tl.int64)[:, None] * IN_FEATURES + reduction[None, :]
        if not IS_GATED:
            factor = tl.load(top_k_weights + pair, mask=has_row, other=0.0).to(tl.float32)
        total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)  # of the gate, if there is one
        up = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
        for k in range(0, STORED, BLOCK_REDUCTION):
            has_k = reduction < STORED - k
            states_mask = has_row[:, None] if IS_EVEN else has_row[:, None] & has_k[None, :]
            weight_mask = has_k[:, None] & has_column[None, :]
            tile = tl.load(row_states + k, mask=states_mask, other=0.0)
            high_tile = tl.load(row_states + STORED + k, mask=states_mask, other=0.0) if KIND == "int4" else tile
            k_weight, k_scales = row_weight + k, row_scales + k // SCALE_COLUMNS * SCALE_STRIDE_COLUMN
            total = _add_product(
                total, tile, high_tile, k_weight, weight_mask, k_scales, k_scales + SCALES_TO_HIGH, has_scale,
                KIND, IS_EVEN, PRECISION,
            )  # fmt: skip
            if IS_GATED:
                k_weight, k_scales = k_weight + OUT_FEATURES * STORED, k_scales + SCALES_TO_UP
                up = _add_product(
                    up, tile, high_tile, k_weight, weight_mask, k_scales, k_scales + SCALES_TO_HIGH, has_scale,
                    KIND, IS_EVEN, PRECISION,
                )  # fmt: skip
        if IS_GATED:
            total = total * tl.sigmoid(total) * up
        else:
            total *= factor[:, None]
        place = output + target.to(tl.int64)[:, None] * OUT_FEATURES + column[None, :]
        tl.store(place, total.to(output.dtype.element_ty), mask=has_row[:, None] & has_column[None, :])


@triton.jit
def _sum_kernel(
    expert_outputs,
    addend,
    output,
    TOP_K: tl.constexpr,
    FEATURES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    has_column = column < FEATURES
    token_outputs = expert_outputs + token * (TOP_K * FEATURES) + column
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOP_K):
        total += tl.load(token_outputs + k * FEATURES, mask=has_column, other=0.0).to(tl.float32)
    if addend is not None:
        total += tl.load(addend + token * FEATURES + column, mask=has_column, other=0.0).to(tl.float32)
    tl.store(output + token * FEATURES + column, total.to(output.dtype.element_ty), mask=has_column)
