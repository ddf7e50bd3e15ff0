"""Logits under guidance, of the ids that may be predicted and no others."""

from typing import TypeGuard
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import nn

from ..weight_hooks import is_hooked
from .sampling import guided_hidden_states, guided_logits


# Of a head: a checksum of its weight, and the spread matrix of that weight.
_SPREAD_MATRICES: WeakKeyDictionary[nn.Module, tuple[int, torch.Tensor]] = WeakKeyDictionary()


# Rows of a head's weight that are looked at together: a copy of all of them in wider numbers would be felt.
ROWS_AT_ONCE = 16384


class GuidedHead:
    r"""
    Guidance is linear in the logits, and these are linear in the hidden states: so the branches are combined before
    the head, which is then applied once, and to the rows of its weight W that may be predicted.

    Rescaling (arXiv 2305.08891) asks for the standard deviation of the logits W h over the whole vocabulary of V ids.
    With w the mean row of W,

        var(W h) = h^T G h / (V - 1),   G = (W - w)^T (W - w),

    a matrix of the hidden size. It is remembered with the head, and made anew where a checksum of the weight tells
    that this is no longer what it was.

    Args:
        head: Hidden states to logits. One that is more than a matrix (sharded, offloaded, quantised, with an adapter)
            is called as it is, for all ids and each branch.
        allowed: First and last-plus-one id that may be predicted. `None`: all.
        never_predicted: Ids of those that are not predicted all the same.
        guidance: `guidance_scale`, `image_guidance_scale`, `guidance_rescale`, see [`guided_logits`].
        num_branches: Of guidance.
    """

    def __init__(
        self,
        head: nn.Module,
        allowed: tuple[int, int] | None,
        never_predicted: list[int],
        guidance: tuple[float, float, float],
        num_branches: int,
    ):
        self.head, self.guidance = head, guidance
        self.allowed = slice(None) if allowed is None else slice(*allowed)
        first = 0 if allowed is None else allowed[0]
        excluded = [token_id - first for token_id in never_predicted if allowed is None or token_id in range(*allowed)]
        self.matrix = head if _is_plain_linear(head) else None
        # Where the logits will be, or a copy in every step would bring them there.
        devices = {parameter.device for parameter in head.parameters() if not parameter.is_meta}
        self.excluded = torch.tensor(excluded, dtype=torch.long, device=next(iter(devices), None))
        self.spread_matrix: torch.Tensor | None = None
        if self.matrix is not None and num_branches > 1 and guidance[2] > 0:
            self.spread_matrix = _remembered_spread_matrix(self.matrix)

    def __call__(self, hidden_states: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            hidden_states: `(branches, masks, hidden)`.
            weights: `(masks,)`, of guidance, see [`guided_logits`].

        Returns:
            `(masks, ids)`, float32 at least.
        """
        if self.matrix is not None:
            logits = self._combined(hidden_states, self.matrix.weight[self.allowed], weights)
        else:
            logits = _at_least_float32(self.head(hidden_states))  # a hook may have put them on another device
            if weights is not None:
                weights = weights.to(logits.device)
            logits = guided_logits(logits, *self.guidance, weights)[:, self.allowed]
        logits.index_fill_(1, self.excluded.to(logits.device), float("-inf"))
        return logits.to(hidden_states.device)

    def _combined(
        self, hidden_states: torch.Tensor, weight: torch.Tensor, weights: torch.Tensor | None
    ) -> torch.Tensor:
        guidance_scale, image_guidance_scale, rescale = self.guidance
        if len(hidden_states) == 1:
            return _at_least_float32(_linear(hidden_states[0], weight))
        branches = _at_least_float32(hidden_states)
        guided = guided_hidden_states(branches, guidance_scale, image_guidance_scale, weights)
        logits = _at_least_float32(_linear(guided.to(weight.dtype), weight))
        if self.spread_matrix is not None:
            conditional_spread, guided_spread = _spread(torch.stack([branches[0], guided]), self.spread_matrix)
            ratio = conditional_spread / (guided_spread + 1e-6)
            factor = rescale * ratio + 1 - rescale
            if weights is not None:
                factor = torch.where(weights > 0, factor, 1.0)
            logits = logits * factor[:, None]
        return logits


def _linear(hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if hidden_states.device.type == "cpu":
        # Faster for a few rows: it is the long side that is shared out among the threads.
        return (weight @ hidden_states.T).T
    return F.linear(hidden_states, weight)


def _spread(hidden_states: torch.Tensor, spread_matrix: torch.Tensor) -> torch.Tensor:
    """The standard deviation over all logits, `(..., masks)`, of hidden states `(..., masks, hidden)`."""
    variance = ((hidden_states @ spread_matrix) * hidden_states).sum(dim=-1)
    return variance.clamp(min=0).sqrt()


@torch.no_grad()
def _remembered_spread_matrix(head: nn.Linear) -> torch.Tensor:
    checksum = _checksum(head.weight)
    remembered = _SPREAD_MATRICES.get(head)
    if remembered is None or remembered[0] != checksum or remembered[1].device != head.weight.device:
        with torch.inference_mode(False):  # what is kept must do for calls outside of it as well
            remembered = checksum, _spread_matrix(head.weight.detach())
        _SPREAD_MATRICES[head] = remembered
    return remembered[1]


def _checksum(weight: torch.Tensor) -> int:
    """Of all bits of a weight, and of their places: sums of its rows and columns as integers, weighted by where."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    num_rows, num_columns = weight.shape
    sums_of_columns = torch.zeros(num_columns, dtype=torch.long, device=weight.device)
    checksum = torch.zeros((), dtype=torch.long, device=weight.device)
    odd = torch.arange(1, 2 * max(num_rows, num_columns), 2, device=weight.device)
    for first in range(0, num_rows, ROWS_AT_ONCE):
        bits = weight.detach()[first : first + ROWS_AT_ONCE].view(integers)
        checksum += (bits.sum(dim=1, dtype=torch.long) * odd[first : first + len(bits)]).sum()
        sums_of_columns += bits.sum(dim=0, dtype=torch.long)
    return int(checksum * 31 + (sums_of_columns * odd[:num_columns]).sum())


def _spread_matrix(weight: torch.Tensor) -> torch.Tensor:
    """G / (V - 1) of a weight `(vocabulary, hidden)`, at least float32."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    num_ids, hidden_size = weight.shape
    mean = weight.mean(dim=0, dtype=dtype)
    spread_matrix = torch.zeros(hidden_size, hidden_size, dtype=dtype, device=weight.device)
    for rows in weight.split(ROWS_AT_ONCE):
        centred = rows.to(dtype) - mean
        spread_matrix.addmm_(centred.T, centred)
    return spread_matrix / (num_ids - 1)


def _is_plain_linear(head: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether rows of its weight may be used without calling it: not sharded, offloaded, quantised or adapted."""
    is_matrix = type(head) is nn.Linear and head.bias is None and type(head.weight) is nn.Parameter
    return is_matrix and not is_hooked(head)


def _at_least_float32(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
