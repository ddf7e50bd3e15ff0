"""
Products with weights in few bits, which are made plain for the time of a product, on any device and with gradients of
the states: what trains, and what computes where there is no kernel.
"""

import torch
import torch.nn.functional as F
from transformers.integrations.moe import _grouped_mm

from .expert_weights import ExpertWeights


SLICE = 32  # experts that are made plain at a time: in float32, all of a layer are gigabytes


class _DequantizedLinear(torch.autograd.Function):
    """The backward pass makes the weight plain anew: kept from the forward pass, those of all layers would be many."""

    @staticmethod
    def forward(ctx, states: torch.Tensor, weights: ExpertWeights) -> torch.Tensor:
        ctx.weights, ctx.dtype = weights, states.dtype
        return F.linear(states, weights.dequantize(states.dtype)[0])

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return (gradient @ ctx.weights.dequantize(gradient.dtype)[0]).to(ctx.dtype), None


def dequantized_linear(states: torch.Tensor, weights: ExpertWeights) -> torch.Tensor:
    """
    `states @ weight.T`, with gradients of the states; the weight is made plain for the time of the product.

    Args:
        states: `(..., in_features)`.
        weights: Of one expert, `(1, out_features, in_features)`.

    Returns:
        `(..., out_features)`.
    """
    return _DequantizedLinear.apply(states, weights)


def experts_one_by_one(
    hidden_states: torch.Tensor,
    gate_up: ExpertWeights,
    down: ExpertWeights,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """
    The formula, `sum over k of weight_k * down_k(silu(gate_k(x)) * up_k(x))`, on any device, with gradients of the
    states and of the weights of the router. Each expert that is used is made plain for the time of its two products.

    Args:
        hidden_states: `(tokens, hidden_size)`.
        gate_up: `(experts, 2 * intermediate_size, hidden_size)`, rows of the gate first.
        down: `(experts, hidden_size, intermediate_size)`.
        top_k_index, top_k_weights: `(tokens, top_k)`.

    Returns:
        `(tokens, hidden_size)`.
    """
    output = torch.zeros_like(hidden_states, dtype=torch.promote_types(hidden_states.dtype, torch.float32))
    for expert in top_k_index.unique().tolist():
        token, place = torch.where(top_k_index == expert)
        gate, up = dequantized_linear(hidden_states[token], gate_up.of_experts(expert, expert + 1)).chunk(2, dim=-1)
        found = (
            dequantized_linear(F.silu(gate) * up, down.of_experts(expert, expert + 1))
            * top_k_weights[token, place, None]
        )
        output = output.index_add(0, token, found.to(output.dtype))
    return output.to(hidden_states.dtype)


class _DequantizedGroupedLinear(torch.autograd.Function):
    """As [`_DequantizedLinear`], each group of states with an expert of its own."""

    @staticmethod
    def forward(ctx, states: torch.Tensor, weights: ExpertWeights, ends: torch.Tensor) -> torch.Tensor:
        ctx.weights, ctx.dtype = weights, states.dtype
        ctx.save_for_backward(ends)
        device_type = states.device.type
        is_cast = torch.is_autocast_enabled(device_type)  # which knows nothing of grouped products
        dtype = torch.get_autocast_dtype(device_type) if is_cast else states.dtype
        return _grouped_mm(states.to(dtype), _plain(weights, dtype).transpose(-2, -1), ends)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        [ends] = ctx.saved_tensors
        found = _grouped_mm(gradient.contiguous(), _plain(ctx.weights, gradient.dtype), ends)
        return found.to(ctx.dtype), None, None


def _plain(weights: ExpertWeights, dtype: torch.dtype) -> torch.Tensor:
    plain = torch.empty(
        len(weights.data), weights.out_features, weights.in_features, dtype=dtype, device=weights.data.device
    )
    for start in range(0, len(plain), SLICE):
        plain[start : start + SLICE] = weights.of_experts(start, start + SLICE).dequantize(dtype)
    return plain


def experts_together(
    hidden_states: torch.Tensor,
    gate_up: ExpertWeights,
    down: ExpertWeights,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """
    What [`experts_one_by_one`] gives, by two grouped products: all experts of the layer are made plain for the time of
    each. On a GPU a hundred thousand small launches fewer, for the memory of one layer's plain weights; torch's
    grouped product has a kernel on Hopper and Blackwell, and loops over the experts on others.

    Args, Returns: as there.
    """
    order = top_k_index.flatten().argsort(stable=True)
    token = order // top_k_index.shape[-1]
    experts = torch.arange(len(gate_up.data), device=order.device)
    ends = torch.searchsorted(top_k_index.flatten()[order], experts, right=True, out_int32=True)
    gate, up = _DequantizedGroupedLinear.apply(hidden_states[token], gate_up, ends).chunk(2, dim=-1)
    found = _DequantizedGroupedLinear.apply(F.silu(gate) * up, down, ends) * top_k_weights.flatten()[order, None]
    output = torch.zeros_like(hidden_states, dtype=torch.promote_types(hidden_states.dtype, torch.float32))
    return output.index_add(0, token, found.to(output.dtype)).to(hidden_states.dtype)
