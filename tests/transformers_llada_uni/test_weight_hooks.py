"""Weights that hooks bring in are taken away again, whatever happens in between."""

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn

from transformers_llada_uni.weight_hooks import is_hooked, weights_in_place


class Recorder(ModelHook):
    def __init__(self, log: list[str], name: str, breaks: bool = False):
        self.log, self.name, self.breaks = log, name, breaks

    def pre_forward(self, module, *args, **kwargs):
        if self.breaks:
            raise OSError(f"{self.name} cannot be read")
        self.log.append(f"{self.name} in")
        return args, kwargs

    def post_forward(self, module, output):
        self.log.append(f"{self.name} out")
        return output


def hooked(log: list[str], name: str, breaks: bool = False) -> nn.Module:
    return add_hook_to_module(nn.Linear(2, 2), Recorder(log, name, breaks))


def test_in_the_order_of_nested_calls():
    log: list[str] = []
    with weights_in_place(hooked(log, "a"), nn.Linear(2, 2), hooked(log, "b")):
        log.append("work")
    assert log == ["a in", "b in", "work", "b out", "a out"]


def test_work_that_fails():
    log: list[str] = []
    with pytest.raises(ZeroDivisionError), weights_in_place(hooked(log, "a"), hooked(log, "b")):
        log.append(str(1 / 0))
    assert log == ["a in", "b in", "b out", "a out"]


def test_weights_that_cannot_be_brought_in():
    log: list[str] = []
    with pytest.raises(OSError, match="b cannot be read"), weights_in_place(hooked(log, "a"), hooked(log, "b", True)):
        log.append("work")
    assert log == ["a in", "a out"]


def test_hooks_that_count():
    module = nn.Linear(2, 2)
    assert not is_hooked(module)
    handle = module.register_forward_pre_hook(lambda *_: None)
    assert is_hooked(module)
    handle.remove()
    assert not is_hooked(module)
    assert is_hooked(hooked([], "a"))
    assert torch.is_tensor(module(torch.zeros(1, 2)))
