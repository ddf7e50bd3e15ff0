"""For type checkers: what transformers' modules of routed experts have (by `use_experts_implementation` mostly)."""

import torch
from torch import nn


class Experts(nn.Module):
    num_experts: int
    gate_up_proj: torch.Tensor
    down_proj: torch.Tensor
    act_fn: nn.Module
    has_gate: bool
    has_bias: bool
    has_post_expert_norm: bool
    is_concatenated: bool
    is_transposed: bool
    _is_expert_parallel: bool

    def _apply_gate(self, gate_up_out: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class Float8Experts(Experts):
    """transformers' `FP8Experts`."""

    gate_up_proj_scale_inv: torch.Tensor
    down_proj_scale_inv: torch.Tensor
    block_size: tuple[int, int] | None
    activation_scheme: str
    gate_softcap: float | None
    swiglu_alpha: float | None
    swiglu_limit: float | None
