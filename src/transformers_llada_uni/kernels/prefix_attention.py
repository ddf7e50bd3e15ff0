"""Attention of a call's queries to the cache's buffers, whose written length only the device knows."""

import torch
import triton
import triton.language as tl

from .rotary import buffer_strides


LOG2_E = 1.4426950408889634
# Two programs for each of an H200's 132 multiprocessors hide each other's latency. Keys are split between programs
# only where rows, heads and positions are too few for so many.
PROGRAMS_TO_FILL = 264
MAX_SPLITS = 16
# Queries (of all heads that share keys) and columns that a program takes at a time, and how many such tiles of keys
# and values are on their way from memory, so that two programs fit into the shared memory of a multiprocessor.
# Without tensor cores, in float32, products are unrolled into single operations: large ones would take long to
# compile and spill registers.
TILES = {torch.bfloat16: (64, 64, 3), torch.float16: (64, 64, 3), torch.float32: (32, 16, 3)}


def can_attend_to_prefix(dtype: torch.dtype, head_dim: int, num_heads: int, num_key_value_heads: int) -> bool:
    """
    Whether [`prefix_attention`] serves such heads: products of tiles ask for a `head_dim` that is a power of two, 16
    to 128, and the query heads of a group must fit into a tile.
    """
    is_served = dtype in TILES and head_dim in (16, 32, 64, 128)
    return is_served and num_heads % num_key_value_heads == 0 and num_heads // num_key_value_heads <= TILES[dtype][0]


def prefix_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    first_column: torch.Tensor,
    padding: torch.Tensor,
    block_length: int,
    scaling: float,
) -> torch.Tensor:
    """
    Grouped-query attention under the block-causal mask: the query at column i sees column j where
    `padding <= j < (i // block_length + 1) * block_length`; one in the padding, `i < padding`, sees nothing and gives
    zeros. Softmax and sums in float32. No gradients.

    Time goes with the columns that are seen, as read from the device, not with the length of the buffers. Of other
    columns nothing is read; but all that some query of the call sees must be finite.

    One launch, or two where keys are split: how often follows from shapes alone. The order of summation is fixed.

    Args:
        query: `(rows, width, heads, head_dim)`, contiguous, of columns `first_column` to `first_column + width - 1`.
        keys, values: `(rows, key_value_heads, buffer_length, head_dim)`, those of the call already written; may be
            views of larger buffers, see [`buffer_strides`]. Query head h uses head `h // (heads / key_value_heads)`.
        first_column: int64 on the device, of one element, not negative.
        padding: `(rows,)`, int64 on the device: each row's first column that is not padding.
        block_length: Columns of an attention block, at least 1; blocks are counted from column 0.
        scaling: Of the scores before softmax.

    Returns:
        `(rows, width, heads * head_dim)`, contiguous.
    """
    rows, width, heads, head_dim = query.shape
    _, key_value_heads, buffer_length, _ = keys.shape
    assert can_attend_to_prefix(query.dtype, head_dim, heads, key_value_heads) and query.is_contiguous()
    assert (keys.shape[0], keys.shape[-1], keys.dtype) == (rows, head_dim, query.dtype)
    assert padding.shape == (rows,) and block_length >= 1
    row_stride, head_stride = buffer_strides(keys, values)
    block_queries, block_columns, num_stages = TILES[query.dtype]
    tiles = triton.cdiv(width, block_queries // (heads // key_value_heads))
    splits = num_splits(rows * key_value_heads * tiles, buffer_length)
    output = query.new_empty(rows, width, heads * head_dim)
    if output.numel() == 0:
        return output
    if splits == 1:
        partial, log_sums = output, None
    else:
        partial = query.new_empty(splits, rows * width * heads, head_dim, dtype=torch.float32)
        log_sums = query.new_empty(splits, rows * width * heads, dtype=torch.float32)
    _prefix_attention_kernel[(tiles, rows * key_value_heads, splits)](
        query,
        keys,
        values,
        partial,
        log_sums,
        first_column,
        padding,
        rows * width * heads,
        width,
        buffer_length,
        row_stride,
        head_stride,
        block_length,
        scaling * LOG2_E,
        heads,
        key_value_heads,
        head_dim,
        block_queries,
        block_columns,
        num_warps=4,
        num_stages=num_stages,
    )
    if splits > 1:
        _combine_kernel[(rows * width * heads,)](
            partial, log_sums, output, rows * width * heads, splits, head_dim, MAX_SPLITS, num_warps=1
        )
    return output


def num_splits(programs: int, buffer_length: int) -> int:
    """Among how many programs the columns are shared out that one would walk, each getting 128 at least."""
    return max(1, min(PROGRAMS_TO_FILL // programs, buffer_length // 128, MAX_SPLITS))


# Numbers that vary from call to call are not specialised on, or each would be compiled anew.
@triton.jit(
    do_not_specialize=[
        "first_column",
        "padding",
        "num_vectors",
        "width",
        "buffer_length",
        "row_stride",
        "head_stride",
        "block_length",
    ]
)
def _prefix_attention_kernel(
    query,
    keys,
    values,
    output,
    log_sums,
    first_column,
    padding,
    num_vectors,
    width,
    buffer_length,
    row_stride,
    head_stride,
    block_length,
    scale,
    HEADS: tl.constexpr,
    KEY_VALUE_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """
    A program's tile of queries has all heads of a group at some positions, as these share keys. With `log_sums`, the
    output is that of the program's share of columns, in float32, and written only for queries that see one of them.
    """
    GROUP: tl.constexpr = HEADS // KEY_VALUE_HEADS
    POSITIONS: tl.constexpr = BLOCK_QUERIES // GROUP
    row, key_head = tl.program_id(1) // KEY_VALUE_HEADS, tl.program_id(1) % KEY_VALUE_HEADS
    line = tl.arange(0, BLOCK_QUERIES)
    position = tl.program_id(0) * POSITIONS + line // GROUP
    is_query = (line < POSITIONS * GROUP) & (position < width)
    vector = (row * width + position) * HEADS + key_head * GROUP + line % GROUP
    channel = tl.arange(0, HEAD_DIM)

    row_padding = tl.load(padding + row).to(tl.int32)
    query_column = tl.load(first_column).to(tl.int32) + position
    limit = tl.minimum((query_column // block_length + 1) * block_length, buffer_length)
    limit = tl.where(is_query & (query_column >= row_padding), limit, 0)
    end = tl.max(limit, axis=0)
    num_tiles = tl.cdiv(tl.maximum(end - row_padding, 0), BLOCK_COLUMNS)
    share = tl.cdiv(num_tiles, tl.num_programs(2)) * BLOCK_COLUMNS
    start = row_padding + tl.program_id(2) * share
    stop = tl.minimum(start + share, end)

    vector_offset = vector[:, None].to(tl.int64) * HEAD_DIM + channel[None, :]
    queries = tl.load(query + vector_offset, mask=is_query[:, None], other=0.0)
    head_offset = (row.to(tl.int64) * row_stride + key_head.to(tl.int64) * head_stride) * HEAD_DIM
    keys += head_offset
    values += head_offset

    maximum = tl.full((BLOCK_QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_QUERIES,), tl.float32)
    mean = tl.zeros((BLOCK_QUERIES, HEAD_DIM), tl.float32)
    for tile_start in range(start, stop, BLOCK_COLUMNS):
        column = tile_start + tl.arange(0, BLOCK_COLUMNS)
        offset = column[:, None] * HEAD_DIM + channel[None, :]
        # Zeros in place of what is not there: a weight of 0 would not hide a NaN among the values.
        is_column = (column < stop)[:, None]
        tile_keys = tl.load(keys + offset, mask=is_column, other=0.0)
        scores = tl.dot(queries, tl.trans(tile_keys), input_precision="ieee") * scale
        is_seen = (column < stop)[None, :] & (column[None, :] < limit[:, None])
        scores = tl.where(is_seen, scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)  # a query may see none of these columns
        weights = tl.exp2(scores - shift[:, None])
        decay = tl.exp2(maximum - shift)
        maximum = new_maximum
        total = total * decay + tl.sum(weights, axis=1)
        tile_values = tl.load(values + offset, mask=is_column, other=0.0)
        mean = tl.dot(weights.to(tile_values.dtype), tile_values, mean * decay[:, None], input_precision="ieee")

    sees_any = total > 0
    mean = mean / tl.where(sees_any, total, 1.0)[:, None]
    if log_sums is None:
        tl.store(output + vector_offset, mean.to(output.dtype.element_ty), mask=is_query[:, None])
    else:
        split_offset = tl.program_id(2).to(tl.int64) * num_vectors
        log_sum = tl.where(sees_any, maximum + tl.log2(tl.where(sees_any, total, 1.0)), float("-inf"))
        tl.store(log_sums + split_offset + vector, log_sum, mask=is_query)
        tl.store(output + split_offset * HEAD_DIM + vector_offset, mean, mask=(is_query & sees_any)[:, None])


@triton.jit(do_not_specialize=["num_vectors", "num_splits"])
def _combine_kernel(
    partial, log_sums, output, num_vectors, num_splits, HEAD_DIM: tl.constexpr, MAX_SPLITS: tl.constexpr
):
    """One program a query's head: its parts, each weighted by its share of the sum of exponentials."""
    vector = tl.program_id(0)
    split = tl.arange(0, MAX_SPLITS)
    channel = tl.arange(0, HEAD_DIM)
    line = split.to(tl.int64) * num_vectors + vector
    is_split = split < num_splits
    log_sum = tl.load(log_sums + line, mask=is_split, other=float("-inf"))
    # Read at once, before it is known which of them were written.
    parts = tl.load(partial + line[:, None] * HEAD_DIM + channel[None, :], mask=is_split[:, None], other=0.0)
    maximum = tl.max(log_sum, axis=0)
    weights = tl.exp2(log_sum - tl.where(maximum == float("-inf"), 0.0, maximum))
    total = tl.sum(weights, axis=0)
    parts = tl.where((log_sum > float("-inf"))[:, None], parts * weights[:, None], 0.0)
    mean = tl.sum(parts, axis=0) / tl.where(total > 0, total, 1.0)
    tl.store(output + vector.to(tl.int64) * HEAD_DIM + channel, mean.to(output.dtype.element_ty))
