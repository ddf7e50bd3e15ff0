"""The product with a weight in few bits, for few rows: the weight is read once as it is stored, in one launch."""

import torch
import triton
import triton.language as tl

from .expert_weights import ExpertWeights
from .experts_kernels import _add_product, precision_of


# More rows would read the weight again and again: then it is better made plain once.
MAX_ROWS = 256
BLOCK_COLUMNS = 32  # as few as that, for a program on every multiprocessor: these weights have 2,000 to 5,000 rows
MAX_BLOCK_ROWS = 64


def groupwise_linear(states: torch.Tensor, weights: ExpertWeights) -> torch.Tensor:
    """
    `states @ weight.T`, summed up in float32. No gradients.

    Args:
        states: `(rows, in_features)`, bfloat16, float16 or float32, on a GPU.
        weights: Of one expert, `(1, out_features, in_features)`, `int8` or `int4`.

    Returns:
        `(rows, out_features)`, of the type of the states.
    """
    assert weights.kind in ("int8", "int4") and len(weights.data) == 1
    assert states.ndim == 2 and states.shape[1] == weights.in_features
    states = states.contiguous()
    output = states.new_empty(len(states), weights.out_features)
    if len(states) == 0:
        return output
    block_rows = min(MAX_BLOCK_ROWS, max(16, triton.next_power_of_2(len(states))))
    largest = 32 if states.dtype == torch.float32 else 64  # four stages of it fit the memory of consumers' cards
    block_reduction = min(weights.scale_shape[1], largest)  # a tile has one scale a row
    grid = (triton.cdiv(weights.out_features, BLOCK_COLUMNS), triton.cdiv(len(states), block_rows))
    with torch.cuda.device_of(states):  # Triton launches on the current device
        _linear_kernel[grid](
            states,
            weights.data,
            weights.scales,
            output,
            len(states),
            weights.out_features,
            weights.in_features,
            weights.kind,
            weights.scale_shape[1],
            precision_of(states),
            block_rows,
            BLOCK_COLUMNS,
            block_reduction,
            num_stages=4,
            num_warps=4,
        )
    return output


@triton.jit(do_not_specialize=["num_rows"])
def _linear_kernel(
    states,
    weight,
    scales,
    output,
    num_rows,
    OUT_FEATURES: tl.constexpr,
    IN_FEATURES: tl.constexpr,
    KIND: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_REDUCTION: tl.constexpr,
):
    # Two columns of an int4 weight are one byte, from the first and from the second half.
    STORED: tl.constexpr = IN_FEATURES // 2 if KIND == "int4" else IN_FEATURES
    SCALES_TO_HIGH: tl.constexpr = STORED // SCALE_COLUMNS * OUT_FEATURES
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    has_column, has_row = column < OUT_FEATURES, row < num_rows
    # A group is a whole number of steps, and the columns are a whole number of groups: only rows and outputs may end.
    reduction = tl.arange(0, BLOCK_REDUCTION)
    column_weight = weight + column[None, :] * STORED + reduction[:, None]
    row_states = states + row.to(tl.int64)[:, None] * IN_FEATURES + reduction[None, :]
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for k in range(0, STORED, BLOCK_REDUCTION):
        tile = tl.load(row_states + k, mask=has_row[:, None], other=0.0)
        high_tile = tl.load(row_states + STORED + k, mask=has_row[:, None], other=0.0) if KIND == "int4" else tile
        k_scales = scales + k // SCALE_COLUMNS * OUT_FEATURES + column
        total = _add_product(
            total, tile, high_tile, column_weight + k, has_column[None, :], k_scales, k_scales + SCALES_TO_HIGH,
            has_column, KIND, OUT_FEATURES % BLOCK_COLUMNS == 0, PRECISION,
        )  # fmt: skip
    place = output + row.to(tl.int64)[:, None] * OUT_FEATURES + column[None, :]
    tl.store(place, total.to(output.dtype.element_ty), mask=has_row[:, None] & has_column[None, :])
