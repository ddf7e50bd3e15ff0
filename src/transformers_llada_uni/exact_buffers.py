"""Buffers that half precision would spoil."""

from collections.abc import Callable
from typing import Self

import torch
from torch import nn


class ExactBuffers(nn.Module):
    """
    A module whose own buffers stay in float32 where `model.to(torch.bfloat16)`, `half()` or a pipeline's `to` cast all
    there is, as they do in loading. A rounded routing bias chooses other experts; rounded rotary frequencies are wrong
    by a radian at the thousandth position.
    """

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        exact = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            cast = self._buffers[name]
            if buffer is not None and cast is not None and cast.dtype in (torch.float16, torch.bfloat16):
                self._buffers[name] = buffer.to(cast.device, torch.float32)
        return self
