"""Which tiles the kernels of routed experts work in: a recorded choice, so that nobody waits for a search."""

from dataclasses import dataclass, replace

import torch

from .expert_weights import ExpertWeights, Kind


@dataclass(frozen=True)
class Tile:
    """
    Args:
        rows: Pairs of token and expert, at least 16.
        columns: Rows of a weight, each an output feature, at least 16 (for gate and up: so many of either).
        reduction: Columns of a weight that are summed up in a step, at least 16 (for `int4`: bytes).
        stages: Steps whose loads are under way together.
        warps: Of a program.
    """

    rows: int
    columns: int
    reduction: int
    stages: int
    warps: int


# By kind of weight: up to so many pairs an expert on average, the tile of gate and up and the tile of down. Rows are
# the average and some more, as a weight is read again for each further tile of rows; empty rows are not read, but cost
# tensor cores their time. To make the table anew, on the card it is for:
#     python benchmarks/experts_gpu.py --seconds 300
# prints the best tiles by kind and tokens (of the released shape: 32 tokens are one pair an expert). Read off an H200,
# with Triton 3.6. Not measured are `int8` beyond 4 pairs, and `float8` and `int4` beyond 40.
Tiles = list[tuple[float, Tile, Tile]]
INFINITY = float("inf")
TILES: dict[Kind, Tiles] = {
    "plain": [
        (8, Tile(16, 32, 256, 3, 4), Tile(16, 128, 128, 3, 4)),
        (16, Tile(32, 64, 128, 3, 4), Tile(32, 128, 128, 3, 4)),
        (40, Tile(64, 64, 64, 4, 4), Tile(64, 128, 64, 4, 4)),
        (64, Tile(128, 128, 64, 3, 8), Tile(64, 128, 64, 4, 4)),
        (INFINITY, Tile(128, 128, 64, 3, 8), Tile(128, 256, 64, 3, 8)),
    ],
    "float8": [
        (4, Tile(16, 64, 128, 4, 4), Tile(16, 128, 128, 4, 4)),
        (16, Tile(32, 64, 128, 4, 4), Tile(32, 128, 128, 4, 4)),
        (40, Tile(32, 64, 128, 4, 4), Tile(64, 128, 64, 4, 4)),
        (INFINITY, Tile(128, 64, 128, 3, 8), Tile(128, 128, 128, 3, 8)),
    ],
    "int8": [
        (4, Tile(16, 64, 64, 4, 4), Tile(16, 128, 64, 4, 4)),
        (16, Tile(32, 64, 128, 4, 4), Tile(32, 128, 128, 4, 4)),
        (40, Tile(64, 64, 64, 5, 4), Tile(64, 128, 64, 4, 4)),
        (INFINITY, Tile(128, 64, 128, 3, 8), Tile(128, 128, 128, 3, 8)),
    ],
    "int4": [
        (4, Tile(16, 64, 64, 5, 4), Tile(16, 128, 64, 5, 4)),
        (40, Tile(32, 64, 64, 5, 4), Tile(32, 128, 64, 5, 4)),
        (INFINITY, Tile(128, 64, 64, 3, 8), Tile(128, 128, 64, 3, 8)),
    ],
}
# Float32 is multiplied without tensor cores, by unrolled loops: small ones, as it is for comparisons.
FLOAT32_TILES: Tiles = [(4, Tile(16, 32, 32, 3, 4), Tile(16, 64, 32, 3, 4))]
FLOAT32_TILES += [(INFINITY, Tile(64, 32, 16, 3, 4), Tile(64, 64, 16, 3, 4))]


def choose_tiles(
    gate_up: ExpertWeights, down: ExpertWeights, dtype: torch.dtype, num_pairs: int, shared_memory: int
) -> tuple[Tile, Tile]:
    """
    Args:
        dtype: Of the states.
        num_pairs: Of token and expert.
        shared_memory: Bytes that a program may have.

    Returns:
        The tiles of gate and up and of down, cut down to the sizes of the weights and to the memory.
    """
    pairs_per_expert = num_pairs / len(gate_up.data)
    recorded = []
    for weights in (gate_up, down):
        table = FLOAT32_TILES if dtype == torch.float32 else TILES[weights.kind]
        recorded.append(next(tiles for limit, *tiles in table if pairs_per_expert <= limit))
    (gate_up_tile, _), (_, down_tile) = recorded
    return (
        _fitted(gate_up_tile, gate_up, gate_up.out_features // 2, 2, dtype, shared_memory),
        _fitted(down_tile, down, down.out_features, 1, dtype, shared_memory),
    )


def _fitted(
    tile: Tile, weights: ExpertWeights, out_features: int, num_weights: int, dtype: torch.dtype, shared_memory: int
) -> Tile:
    stored = weights.data.shape[2]
    reduction = min(tile.reduction, _next_power_of_2(stored))
    if weights.kind != "plain":
        reduction = min(reduction, weights.scale_shape[1])  # a tile has one scale a row
    tile = replace(tile, columns=min(tile.columns, _next_power_of_2(out_features)), reduction=reduction)
    num_states = 2 if weights.kind == "int4" else 1
    bytes_of_stage = tile.reduction * (
        num_states * tile.rows * dtype.itemsize + num_weights * tile.columns * weights.data.element_size()
    )
    return replace(tile, stages=max(1, min(tile.stages, shared_memory // bytes_of_stage)))


def _next_power_of_2(size: int) -> int:
    """At least 16, which is what a tensor core takes."""
    return max(16, 1 << (size - 1).bit_length())
