"""RMSNorm, with the addition to the residual stream that goes before it, and the gate of an MLP: one launch each."""

import torch
import triton
import triton.language as tl


def rms_norm(
    hidden: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """
    `Glm4MoeRMSNorm` of transformers: computed in float32, rounded to the dtype of the input, then times the weight.
    No gradients.

    Args:
        hidden: `(..., hidden_size)`, bfloat16, float16 or float32.
        weight: `(hidden_size,)`, of the same dtype.
        eps: Added to the mean of squares.
        residual: As `hidden`; added to it first, and the sum rounded, as the model does.

    Returns:
        The normed states; with `residual`, these and the sum, which is the new residual. All as `hidden`, contiguous.
    """
    size = hidden.shape[-1]
    assert weight.shape == (size,) and weight.dtype == hidden.dtype
    hidden = hidden.contiguous()
    if residual is not None:
        assert residual.shape == hidden.shape and residual.dtype == hidden.dtype
        residual = residual.contiguous()
    normed = torch.empty_like(hidden)
    total = None if residual is None else torch.empty_like(hidden)
    block = triton.next_power_of_2(size)
    if hidden.numel() > 0:
        _rms_norm_kernel[(hidden.numel() // size,)](
            hidden, residual, weight, normed, total, eps, size, block, num_warps=min(max(block // 256, 1), 8)
        )
    return normed if total is None else (normed, total)


def silu_multiply(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """
    `silu(gate) * up`, the middle of a gated MLP, with silu rounded to the dtype before the product as the model's
    is. No gradients.

    Args:
        gate, up: `(..., features)` of one shape and dtype; may be the two halves of one product's last dimension.

    Returns:
        As `gate`, contiguous.
    """
    assert up.shape == gate.shape and up.dtype == gate.dtype
    size = gate.shape[-1]
    output = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if output.numel() > 0:
        gate, up = gate.reshape(-1, size), up.reshape(-1, size)  # of halves still views
        gate, up = (states if states.stride(-1) == 1 else states.contiguous() for states in (gate, up))
        block = min(triton.next_power_of_2(size), 1024)
        _silu_multiply_kernel[(len(gate), triton.cdiv(size, block))](
            gate, up, output, gate.stride(0), up.stride(0), size, block, num_warps=min(max(block // 256, 1), 4)
        )
    return output


@triton.jit
def _rms_norm_kernel(hidden, residual, weight, normed, total, eps, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """One program a token. `residual` and `total` may be None."""
    channel = tl.arange(0, BLOCK)
    is_channel = channel < SIZE
    offset = tl.program_id(0).to(tl.int64) * SIZE + channel
    states = tl.load(hidden + offset, mask=is_channel, other=0.0).to(tl.float32)
    scale = tl.load(weight + channel, mask=is_channel, other=0.0).to(tl.float32)
    if residual is not None:
        states += tl.load(residual + offset, mask=is_channel, other=0.0).to(tl.float32)
        rounded = states.to(total.dtype.element_ty)
        tl.store(total + offset, rounded, mask=is_channel)
        states = rounded.to(tl.float32)
    states *= tl.rsqrt(tl.sum(states * states, axis=0) / SIZE + eps)
    states = states.to(normed.dtype.element_ty).to(tl.float32) * scale
    tl.store(normed + offset, states.to(normed.dtype.element_ty), mask=is_channel)


@triton.jit
def _silu_multiply_kernel(gate, up, output, gate_stride, up_stride, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """One program for a part of a token's features."""
    token = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_feature = feature < SIZE
    gated = tl.load(gate + token * gate_stride + feature, mask=is_feature, other=0.0).to(tl.float32)
    states = tl.load(up + token * up_stride + feature, mask=is_feature, other=0.0).to(tl.float32)
    gated = (gated * tl.sigmoid(gated)).to(output.dtype.element_ty).to(tl.float32)
    tl.store(output + token * SIZE + feature, (gated * states).to(output.dtype.element_ty), mask=is_feature)
