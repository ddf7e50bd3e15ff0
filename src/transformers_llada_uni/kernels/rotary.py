"""From the fused projection to rotated queries and a cache that has the new keys and values, in one launch."""

import torch
import triton
import triton.language as tl


# Heads of 128 channels that a program takes: 1,024 numbers for 128 threads, 16 bytes a thread in half precision.
VECTORS_PER_PROGRAM = 8


def rotate_and_store(
    query_key_value: torch.Tensor,
    query_weight: torch.Tensor,
    key_weight: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    first_column: torch.Tensor,
    num_heads: int,
    num_key_value_heads: int,
) -> torch.Tensor:
    """
    What `LLaDA2MoeAttention` does between its first product and attention: RMSNorm of each query and key head, rotary
    embedding of their first channels (half-split), and the update of the cache. In float32, rounded once at the end
    where the model rounds after each operation. No gradients.

    Args:
        query_key_value: `(rows, width, (num_heads + 2 * num_key_value_heads) * head_dim)`, contiguous: query heads,
            key heads, value heads.
        query_weight, key_weight: `(head_dim,)`, of the norms.
        eps: Of the norms.
        cos, sin: `(rows or 1, width, rotary_dim)`, as `Glm4MoeRotaryEmbedding` gives them, contiguous. Any float
            dtype.
        keys, values: `(rows, num_key_value_heads, buffer_length, head_dim)`, written in place: position i of the call
            becomes column `first_column + i`. Columns behind the buffer are dropped. May be views of larger buffers,
            see [`buffer_strides`].
        first_column: int64 on the device, of one element, not negative.

    Returns:
        The queries, `(rows, width, num_heads, head_dim)`, contiguous: as [`prefix_attention`] takes them.
    """
    rows, width, features = query_key_value.shape
    head_dim, rotary_dim = query_weight.numel(), cos.shape[-1]
    vectors = rows * width * (num_heads + 2 * num_key_value_heads)
    assert features == (num_heads + 2 * num_key_value_heads) * head_dim and query_key_value.is_contiguous()
    assert cos.shape == sin.shape and cos.shape[0] in (1, rows) and cos.shape[1] == width and rotary_dim <= head_dim
    assert cos.is_contiguous() and sin.is_contiguous()
    assert keys.shape[:2] == (rows, num_key_value_heads) and keys.shape[-1] == head_dim
    row_stride, head_stride = buffer_strides(keys, values)
    query = query_key_value.new_empty(rows, width, num_heads, head_dim)
    if vectors > 0:
        _rotate_and_store_kernel[(triton.cdiv(vectors, VECTORS_PER_PROGRAM),)](
            query_key_value,
            query_weight,
            key_weight,
            eps,
            cos,
            sin,
            query,
            keys,
            values,
            first_column,
            vectors,
            width,
            width if cos.shape[0] == rows else 0,
            keys.shape[2],
            row_stride,
            head_stride,
            num_heads,
            num_key_value_heads,
            head_dim,
            rotary_dim,
            VECTORS_PER_PROGRAM,
            triton.next_power_of_2(head_dim),
            num_warps=4,
        )
    return query


def buffer_strides(keys: torch.Tensor, values: torch.Tensor) -> tuple[int, int]:
    """
    The strides of rows and heads of two buffers `(rows, heads, buffer_length, head_dim)`, in columns.

    Kernels take them in columns, so that the compiler knows every address to be a multiple of `head_dim`. Both buffers
    have one shape, dtype and layout, in which the columns of a head lie side by side.
    """
    head_dim = keys.shape[-1]
    assert (keys.shape, keys.dtype, keys.stride()) == (values.shape, values.dtype, values.stride())
    row_stride, head_stride, *inner_strides = keys.stride()
    assert inner_strides == [head_dim, 1] and row_stride % head_dim == head_stride % head_dim == 0
    return row_stride // head_dim, head_stride // head_dim


# Numbers that vary from call to call are not specialised on, or each would be compiled anew.
@triton.jit(
    do_not_specialize=[
        "first_column",
        "num_vectors",
        "width",
        "angle_row_stride",
        "buffer_length",
        "row_stride",
        "head_stride",
    ]
)
def _rotate_and_store_kernel(
    query_key_value,
    query_weight,
    key_weight,
    eps,
    cos,
    sin,
    query,
    keys,
    values,
    first_column,
    num_vectors,
    width,
    angle_row_stride,
    buffer_length,
    row_stride,
    head_stride,
    HEADS: tl.constexpr,
    KEY_VALUE_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    BLOCK_VECTORS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """A vector is one head of one token; those of a program may be of all three kinds."""
    vector = tl.program_id(0) * BLOCK_VECTORS + tl.arange(0, BLOCK_VECTORS)
    is_vector = vector < num_vectors
    token, head = vector // (HEADS + 2 * KEY_VALUE_HEADS), vector % (HEADS + 2 * KEY_VALUE_HEADS)
    row, position = token // width, token % width
    is_query = is_vector & (head < HEADS)
    is_key = is_vector & (head >= HEADS) & (head < HEADS + KEY_VALUE_HEADS)
    is_value = is_vector & (head >= HEADS + KEY_VALUE_HEADS)

    channel = tl.arange(0, BLOCK_CHANNELS)
    is_channel = channel < HEAD_DIM
    # The channel that each of the first ones is turned with: half of them further on, or back.
    is_rotated = channel < ROTARY_DIM
    is_first_half = channel < ROTARY_DIM // 2
    partner = tl.where(is_first_half, channel + ROTARY_DIM // 2, channel - ROTARY_DIM // 2)

    states = tl.load(
        query_key_value + vector[:, None].to(tl.int64) * HEAD_DIM + channel[None, :],
        mask=is_vector[:, None] & is_channel[None, :],
        other=0.0,
    )
    partner_states = tl.load(
        query_key_value + vector[:, None].to(tl.int64) * HEAD_DIM + partner[None, :],
        mask=is_vector[:, None] & is_rotated[None, :],
        other=0.0,
    ).to(tl.float32)
    weight = tl.where(
        is_query[:, None],
        tl.load(query_weight + channel, mask=is_channel, other=0.0)[None, :],
        tl.load(key_weight + channel, mask=is_channel, other=0.0)[None, :],
    ).to(tl.float32)
    partner_weight = tl.where(
        is_query[:, None],
        tl.load(query_weight + partner, mask=is_rotated, other=0.0)[None, :],
        tl.load(key_weight + partner, mask=is_rotated, other=0.0)[None, :],
    ).to(tl.float32)
    angle = (row * angle_row_stride + position)[:, None] * ROTARY_DIM + channel[None, :]
    has_angle = is_vector[:, None] & is_rotated[None, :]
    cosine = tl.load(cos + angle, mask=has_angle, other=1.0).to(tl.float32)
    sine = tl.load(sin + angle, mask=has_angle, other=0.0).to(tl.float32)

    wide = states.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=1) / HEAD_DIM + eps)[:, None]
    turned = tl.where(is_first_half[None, :], -partner_states, partner_states) * partner_weight
    rotated = (scale * (wide * weight * cosine + turned * sine)).to(states.dtype)

    tl.store(
        query + (token * HEADS + head)[:, None].to(tl.int64) * HEAD_DIM + channel[None, :],
        rotated,
        mask=is_query[:, None] & is_channel[None, :],
    )
    column = tl.load(first_column).to(tl.int64) + position
    in_buffer = (column < buffer_length)[:, None] & is_channel[None, :]
    of_row = row.to(tl.int64) * row_stride + column
    key_line = of_row + (head - HEADS) * head_stride
    value_line = of_row + (head - HEADS - KEY_VALUE_HEADS) * head_stride
    tl.store(keys + key_line[:, None] * HEAD_DIM + channel[None, :], rotated, mask=is_key[:, None] & in_buffer)
    tl.store(values + value_line[:, None] * HEAD_DIM + channel[None, :], states, mask=is_value[:, None] & in_buffer)
