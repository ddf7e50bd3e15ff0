"""Experts of few tokens on a CPU: every token is multiplied by its expert's weights where they lie, in one kernel."""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from transformers.integrations.moe import batched_mm_experts_forward, grouped_mm_experts_forward
from transformers.utils.import_utils import is_torch_greater_or_equal


# Beyond so many tokens an expert the gain over `grouped_mm` shrinks, and only prompts have so many
# (`benchmarks/experts.py`). In half precision its products of matrices are twice as fast, while this loop computes in
# float32; float64 it does not know.
MAX_TOKENS_PER_EXPERT = {torch.bfloat16: 8, torch.float16: 8, torch.float32: 16, torch.float64: math.inf}


def fused_gather_experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    r"""
    transformers' interface of experts, as `experts_implementation="fused_gather"`.

    A step of block diffusion has some tens of tokens, a few for each expert. One product of matrices per expert, as
    `grouped_mm` makes them, is then too small for threads, and the time goes into starting them. Here all products
    are one loop over pairs of token and expert, sorted by expert so that weights are read from memory once; the
    order of summation is a pair's own, so a token's result does not depend on what else is in the loop.

    `torch.compile` writes the loop, with its default backend: the first call takes some seconds and a C++ compiler.
    With more than `MAX_TOKENS_PER_EXPERT` tokens an expert, with gradients, with experts spread over devices or of
    another form (with biases, transposed, ...), off CPUs, and where dynamo is switched off, this is `grouped_mm`
    (`batched_mm` for float64, which the former does not know).

    Args:
        hidden_states: `(tokens, hidden_size)`.
        top_k_index, top_k_weights: `(tokens, top_k)`.

    Returns:
        `(tokens, hidden_size)`.

    Raises:
        ImportError: with torch before 2.13.
        RuntimeError: without a C++ compiler.
    """
    max_pairs = self.num_experts * MAX_TOKENS_PER_EXPERT.get(hidden_states.dtype, 0)
    is_small = 0 < top_k_index.numel() <= max_pairs and hidden_states.device.type == "cpu"
    is_plain = self.has_gate and not (self.has_bias or self.is_transposed or self.has_post_expert_norm)
    is_ours = is_small and is_plain and not (torch.is_grad_enabled() or self._is_expert_parallel)
    # Asked last: elsewhere dynamo need not be imported.
    if not (is_ours and (torch.compiler.is_compiling() or not torch._dynamo.config.disable)):
        is_double = hidden_states.dtype == torch.float64
        other_forward = batched_mm_experts_forward if is_double else grouped_mm_experts_forward
        return other_forward(self, hidden_states, top_k_index, top_k_weights)

    expert, pair = top_k_index.flatten().sort()
    token = pair // top_k_index.shape[1]
    gate_up = linear_of_expert(hidden_states[token], self.gate_up_proj, expert)
    output = linear_of_expert(self._apply_gate(gate_up), self.down_proj, expert)
    output = output * top_k_weights.flatten()[pair, None]
    output = torch.empty_like(output).index_copy(0, pair, output).unflatten(0, top_k_index.shape).sum(dim=1)
    return output.to(hidden_states.dtype)


def linear_of_expert(states: torch.Tensor, weight: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
    """
    Args:
        states: `(pairs, in_features)`.
        weight: `(experts, out_features, in_features)`.
        expert: `(pairs,)`, sorted.

    Returns:
        `(pairs, out_features)`.
    """
    if torch.compiler.is_compiling():
        return _linear_of_expert(states, weight, expert)  # part of the graph that is being made
    # One kernel for any number of pairs. The shape of the weight stays fixed: loops of known length are faster.
    torch._dynamo.maybe_mark_dynamic(states, 0)
    torch._dynamo.maybe_mark_dynamic(expert, 0)
    return _compiled_linear_of_expert()(states, weight, expert)


def _linear_of_expert(states: torch.Tensor, weight: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
    # Not compiled, this would be a copy of an expert for every pair.
    return (states[:, None, :] * weight[expert]).sum(dim=-1)


@functools.cache
def _compiled_linear_of_expert() -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    if not is_torch_greater_or_equal("2.13", accept_dev=True):
        raise ImportError(f"`experts_implementation='fused_gather'` needs torch 2.13, this is {torch.__version__}.")
    from torch._inductor.cpp_builder import get_cpp_compiler  # takes a second; only who compiles waits for it
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise RuntimeError(
            f"`experts_implementation='fused_gather'` needs a C++ compiler, such as g++ or what $CXX names: {error}"
        ) from error
    # As many shapes and types of weights as there are models in the process
    options: dict[str, Any] = {"recompile_limit": 64, "isolate_recompiles": True}  # torch's annotations lack them
    return torch.compile(_linear_of_expert, fullgraph=True, dynamic=False, **options)
