"""Logits under guidance, of the ids that may be predicted and no others."""

import torch
import torch.nn.functional as F
from torch import nn

from .block_diffusion_sampling import guided_hidden_states, guided_logits


class GuidedHead:
    r"""
    Guidance is linear in the logits, and these are linear in the hidden states: so the branches are combined before
    the head, which is then applied once, and to the rows of its weight W that may be predicted.

    Rescaling (arXiv 2305.08891) asks for the standard deviation of the logits W h over the whole vocabulary of V ids.
    With w the mean row of W,

        var(W h) = h^T G h / (V - 1),   G = (W - w)^T (W - w),

    a matrix of the hidden size that is made at the first step. It is not kept for longer than the head, as nothing
    tells for sure that a weight is still what it was.

    Args:
        head: Hidden states to logits. One that is more than a matrix (sharded, offloaded, quantised, with an adapter)
            is called as it is, for all ids and each branch.
        allowed: First and last-plus-one id that may be predicted. `None`: all.
        never_predicted: Ids of those that are not predicted all the same.
        guidance: `guidance_scale`, `image_guidance_scale`, `guidance_rescale`, see [`guided_logits`].
    """

    def __init__(
        self,
        head: nn.Module,
        allowed: tuple[int, int] | None,
        never_predicted: list[int],
        guidance: tuple[float, float, float],
    ):
        self.head, self.guidance = head, guidance
        self._spread_matrix: torch.Tensor | None = None
        self.low, self.high = allowed or (0, head.out_features)
        self.excluded = [token_id - self.low for token_id in never_predicted if self.low <= token_id < self.high]

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """
        Args:
            hidden_states: `(branches, masks, hidden)`.

        Returns:
            `(masks, ids)`, float32 at least.
        """
        if _is_plain_linear(self.head):
            logits = self._combined(hidden_states)
        else:
            logits = guided_logits(_at_least_float32(self.head(hidden_states)), *self.guidance)[
                :, self.low : self.high
            ]
        logits[:, self.excluded] = float("-inf")
        return logits

    def _combined(self, hidden_states: torch.Tensor) -> torch.Tensor:
        *scales, rescale = self.guidance
        weight = self.head.weight[self.low : self.high]
        if len(hidden_states) == 1:
            return _at_least_float32(_linear(hidden_states[0], weight))
        branches = _at_least_float32(hidden_states)
        guided = guided_hidden_states(branches, *scales)
        logits = _at_least_float32(_linear(guided.to(weight.dtype), weight))
        if rescale > 0:
            if self._spread_matrix is None:
                self._spread_matrix = _spread_matrix(self.head.weight)
            conditional_spread, guided_spread = (_spread(h, self._spread_matrix) for h in (branches[0], guided))
            ratio = conditional_spread / (guided_spread + 1e-6)
            logits = logits * (rescale * ratio + 1 - rescale)[:, None]
        return logits


def _linear(hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if hidden_states.device.type == "cpu":
        # Faster for a few rows: it is the long side that is shared out among the threads.
        return (weight @ hidden_states.T).T
    return F.linear(hidden_states, weight)


def _spread(hidden_states: torch.Tensor, spread_matrix: torch.Tensor) -> torch.Tensor:
    """The standard deviation over all logits, `(masks,)`, of hidden states `(masks, hidden)`."""
    variance = ((hidden_states @ spread_matrix) * hidden_states).sum(dim=-1)
    return variance.clamp(min=0).sqrt()


@torch.no_grad()
def _spread_matrix(weight: torch.Tensor) -> torch.Tensor:
    """G / (V - 1) of a weight `(vocabulary, hidden)`, at least float32."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    num_ids, hidden_size = weight.shape
    mean = weight.mean(dim=0, dtype=dtype)
    spread_matrix = torch.zeros(hidden_size, hidden_size, dtype=dtype, device=weight.device)
    for rows in weight.split(16384):  # a whole copy of a large head would be felt
        centred = rows.to(dtype) - mean
        spread_matrix.addmm_(centred.T, centred)
    return spread_matrix / (num_ids - 1)


def _is_plain_linear(head: nn.Module) -> bool:
    """Whether rows of its weight may be used without calling it: not sharded, offloaded, quantised or adapted."""
    hooked = head._forward_hooks or head._forward_pre_hooks or hasattr(head, "_hf_hook")
    return type(head) is nn.Linear and type(head.weight) is nn.Parameter and not hooked


def _at_least_float32(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
