"""What CUDA graphs are on a GPU, for tests on a CPU: a step is traced once to operators and then replayed as such."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from transformers_llada_uni.generation import recording


class TracedProgram:
    """
    Stands in for [`CudaGraph`]: whatever Python decided while the program was traced is fixed in it, as it is in a
    CUDA graph, and a program that reads the value of a tensor cannot be traced.
    """

    count = 0

    def __init__(self, program: Callable[[], None], pool):
        TracedProgram.count += 1
        # Of each value that is traced the shape is noted as a fake tensor. Without a context every one of them would
        # be given a mode of its own, which takes longer than all the rest.
        with torch.no_grad(), tracing(TracingContext(FakeTensorMode())):
            self.program = make_fx(lambda _: program())(torch.zeros(()))
        self.has_run = True  # tracing runs it, recording does not

    def replay(self) -> None:
        if not self.has_run:
            with torch.no_grad():
                self.program(torch.zeros(()))
        self.has_run = False


class Pool:
    def renew(self) -> None:
        """There is no memory to be had anew."""


@contextmanager
def recorded_on_cpu() -> Iterator[None]:
    """Within, generation on a CPU goes the way of GPUs: static buffers, recorded steps."""
    with (
        mock.patch.object(recording, "CudaGraph", TracedProgram),
        mock.patch.object(recording, "RECORDABLE_DEVICES", ("cuda", "cpu")),
        mock.patch.object(recording, "BUFFER_LENGTHS", (128, 256, 512, 1024)),
        mock.patch.object(recording, "PIECES", (64, 16)),
        mock.patch.object(recording, "GraphPool", Pool),
    ):
        yield
