"""Experts of few tokens on a GPU: the weights of the experts that are used are read once, in four launches."""

import functools
import math
from typing import Any, cast

import torch
from torch import nn
from transformers.activations import SiLUActivation
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, fp8_grouped_mm_experts_forward
from transformers.integrations.moe import (
    ALL_EXPERTS_FUNCTIONS,
    _default_apply_gate,
    batched_mm_experts_forward,
    grouped_mm_experts_forward,
)

from . import DTYPES, HAS_TRITON, IS_INTERPRETED, has_grouped_mm_kernel, is_kernel_device
from .expert_tiles import choose_tiles
from .expert_weights import ExpertWeights, Kind


# Pairs of token and expert, per expert on average, beyond which `grouped_mm` does it: 128 are 4,096 tokens of the
# released shape, the most that was measured (`benchmarks/experts_gpu.py`): 14.7 ms in place of 24.5. For float8
# transformers' own kernels have to be downloaded, and round states. Where torch has no kernel of `grouped_mm`, nothing
# is too much.
MAX_PAIRS_PER_EXPERT = {"plain": 128, "float8": math.inf}
MIN_CAPABILITY = {"plain": (8, 0), "float8": (8, 9)}  # of the card: Ampere; Ada, which can convert float8
SMALL_SHARED_MEMORY = 99 * 1024  # that a program may have on consumers' cards


def triton_experts_forward(
    self: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    addend: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""
    transformers' interface of experts, as `experts_implementation="triton"`.

    A step of block diffusion has some tens of tokens, and each expert gets a few of them or none: the time is that of
    reading weights. `grouped_mm` reads them once too but takes 15 launches, `batched_mm` reads them for each token.
    Here the host reads nothing, and shapes alone decide about sizes, so it can be recorded in a CUDA graph.

    With more than `MAX_PAIRS_PER_EXPERT`, with gradients, with experts spread over devices or of another form (with
    biases, transposed, quantised, ...), off CUDA and on cards before Ampere this is `grouped_mm` (`batched_mm` for
    float64, which the former does not know).

    Args:
        hidden_states: `(tokens, hidden_size)`.
        top_k_index, top_k_weights: `(tokens, top_k)`, see [`triton_experts`].
        addend: `(tokens, hidden_size)`, added to the sum over the experts: what a shared expert gave. Default: none.

    Returns:
        `(tokens, hidden_size)`.
    """
    is_ours = (
        _can_compute(self, hidden_states, top_k_index, "plain")
        and type(self)._apply_gate is _default_apply_gate
        and self.gate_up_proj.dtype == self.down_proj.dtype == hidden_states.dtype
    )
    if is_ours:
        return triton_experts(
            hidden_states, self.gate_up_proj, self.down_proj, top_k_index, top_k_weights, addend=addend
        )
    is_double = hidden_states.dtype == torch.float64
    other_forward = batched_mm_experts_forward if is_double else grouped_mm_experts_forward
    output = other_forward(self, hidden_states, top_k_index, top_k_weights.to(hidden_states.dtype))
    return output if addend is None else output + addend


def triton_fp8_experts_forward(
    self: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    addend: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    The same for transformers' `FP8Experts`, block-scaled float8, and any number of tokens. States stay as they are,
    where transformers rounds them to float8 too.

    With gradients, static scales of states, another gate or other scales than the FP8 release has, and on cards
    before Ada this is the `grouped_mm` of these experts.
    """
    is_ours = (
        _can_compute(self, hidden_states, top_k_index, "float8")
        and self.activation_scheme == "dynamic"
        and self.gate_softcap is None
        and self.swiglu_alpha is None
        and self.swiglu_limit is None
        and self.gate_up_proj.dtype == self.down_proj.dtype == torch.float8_e4m3fn
        and self.gate_up_proj_scale_inv.dtype == self.down_proj_scale_inv.dtype == torch.float32
    )
    if is_ours and self.block_size is not None:
        rows, columns = self.block_size
        gate_up = ExpertWeights("float8", self.gate_up_proj, self.gate_up_proj_scale_inv, (rows, columns), parts=2)
        down = ExpertWeights("float8", self.down_proj, self.down_proj_scale_inv, (rows, columns))
        return triton_experts(hidden_states, gate_up, down, top_k_index, top_k_weights, addend=addend)
    output = fp8_grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights.to(hidden_states.dtype))
    return output if addend is None else output + addend


def triton_experts(
    hidden_states: torch.Tensor,
    gate_up: ExpertWeights | torch.Tensor,
    down: ExpertWeights | torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    addend: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    `sum over k of weight_k * down_k(silu(gate_k(x)) * up_k(x)) + addend`. Products and sums are taken in float32, in
    an order that depends on sizes alone; `silu(gate) * up`, each expert's weighted output, and the sum are rounded to
    the type of the states. No gradients.

    Args:
        hidden_states: `(tokens, hidden_size)`, bfloat16, float16 or float32, on a GPU.
        gate_up: `(experts, 2 * intermediate_size, hidden_size)`, rows of the gate first; a tensor of the type of the
            states, or of any kind that [`ExpertWeights`] knows.
        down: `(experts, hidden_size, intermediate_size)`, likewise.
        top_k_index: `(tokens, top_k)`. Each must be one of the experts: nobody looks.
        top_k_weights: `(tokens, top_k)`, of any floating type.
        addend: `(tokens, hidden_size)`, of any floating type.

    Returns:
        `(tokens, hidden_size)`, of the type of the states.
    """
    if torch.compiler.is_compiling():
        return _triton_experts_operator(
            hidden_states, *_taken_apart(gate_up), *_taken_apart(down), top_k_index, top_k_weights, addend
        )
    gate_up, down = (w if isinstance(w, ExpertWeights) else ExpertWeights("plain", w) for w in (gate_up, down))
    _check(hidden_states, gate_up, down, top_k_index, top_k_weights, addend)
    if top_k_index.numel() == 0:
        return torch.zeros_like(hidden_states) if addend is None else addend.to(hidden_states.dtype, copy=True)
    from . import experts_kernels as products

    hidden_states, top_k_index, top_k_weights = (
        tensor.contiguous() for tensor in (hidden_states, top_k_index, top_k_weights)
    )
    gate_up_tile, down_tile = choose_tiles(
        gate_up, down, hidden_states.dtype, top_k_index.numel(), _shared_memory(hidden_states.device)
    )
    with torch.cuda.device_of(hidden_states):  # Triton launches on the current device
        pairs, offsets = products.order_pairs(top_k_index, len(gate_up.data))
        states = products.gate_and_up(hidden_states, gate_up, pairs, offsets, gate_up_tile)
        outputs = products.down(states, down, top_k_weights, pairs, offsets, down_tile)
        return products.sum_of_experts(outputs, top_k_index.shape[1], None if addend is None else addend.contiguous())


@torch.library.custom_op("llada_uni::triton_experts", mutates_args=())
def _triton_experts_operator(
    hidden_states: torch.Tensor,
    gate_up: torch.Tensor,
    gate_up_scales: torch.Tensor | None,
    gate_up_kind: str,
    gate_up_scale_shape: list[int],
    down: torch.Tensor,
    down_scales: torch.Tensor | None,
    down_kind: str,
    down_scale_shape: list[int],
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    addend: torch.Tensor | None,
) -> torch.Tensor:
    """[`triton_experts`] as one node of a compiled graph, which need not know what is inside."""
    return triton_experts(
        hidden_states,
        _put_together(gate_up, gate_up_scales, gate_up_kind, gate_up_scale_shape, parts=2),
        _put_together(down, down_scales, down_kind, down_scale_shape, parts=1),
        top_k_index,
        top_k_weights,
        addend,
    )


@_triton_experts_operator.register_fake
def _(hidden_states: torch.Tensor, *_) -> torch.Tensor:
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)


def _taken_apart(weights: ExpertWeights | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, str, list[int]]:
    if isinstance(weights, ExpertWeights):
        return weights.data, weights.scales, weights.kind, list(weights.scale_shape)
    return weights, None, "plain", [1, 1]


def _put_together(
    data: torch.Tensor, scales: torch.Tensor | None, kind: str, scale_shape: list[int], parts: int
) -> ExpertWeights:
    rows, columns = scale_shape
    return ExpertWeights(cast(Kind, kind), data, scales, (rows, columns), parts)


def _can_compute(self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, kind: str) -> bool:
    """Whether experts, states and machine are what the kernels are for, all but the types of the weights."""
    is_much = top_k_index.numel() > self.num_experts * MAX_PAIRS_PER_EXPERT[kind]
    if not HAS_TRITON or (is_much and has_grouped_mm_kernel(hidden_states.device, hidden_states.dtype)):
        return False
    if not (self.has_gate and self.is_concatenated and isinstance(self.act_fn, nn.SiLU | SiLUActivation)):
        return False
    if self.has_bias or self.is_transposed or self.has_post_expert_norm or self._is_expert_parallel:
        return False
    if torch.is_grad_enabled() or hidden_states.dtype not in DTYPES:
        return False
    for weight in (self.gate_up_proj, self.down_proj):
        # Not those that torchao quantises, or that are shards
        is_plain = type(weight) in (nn.Parameter, torch.Tensor) and weight.is_contiguous()
        if not (is_plain and weight.device == hidden_states.device):
            return False
    if IS_INTERPRETED:
        return True
    device = hidden_states.device
    return is_kernel_device(device) and torch.cuda.get_device_capability(device) >= MIN_CAPABILITY[kind]


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that a program may have."""
    if device.type != "cuda":
        return SMALL_SHARED_MEMORY
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", SMALL_SHARED_MEMORY)


def _check(
    hidden_states: torch.Tensor,
    gate_up: ExpertWeights,
    down: ExpertWeights,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    addend: torch.Tensor | None,
) -> None:
    """Nothing that a kernel would read beyond."""
    num_experts, (tokens, hidden_size) = len(gate_up.data), hidden_states.shape
    assert hidden_states.dtype in DTYPES and gate_up.in_features == hidden_size and gate_up.out_features % 2 == 0
    found = len(down.data), down.out_features, down.in_features
    assert found == (num_experts, hidden_size, gate_up.out_features // 2)
    assert gate_up.kind == "plain" or gate_up.parts == 2
    for weights in (gate_up, down):
        assert weights.data.device == hidden_states.device
        assert weights.kind != "plain" or weights.data.dtype == hidden_states.dtype
    assert len(top_k_index) == tokens and top_k_index.dtype in (torch.int64, torch.int32)
    assert top_k_weights.shape == top_k_index.shape
    assert addend is None or addend.shape == hidden_states.shape


ALL_EXPERTS_FUNCTIONS.register("triton", triton_experts_forward)
ALL_FP8_EXPERTS_FUNCTIONS.register("triton", triton_fp8_experts_forward)
