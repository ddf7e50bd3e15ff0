"""The fingerprint of what makes a difference differs, and that of what makes none does not."""

import copy
import datetime
import functools
import re
import subprocess
import sys
import threading
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from PIL import Image
from torch import nn

from diffusers_llada_uni import LLaDAUniPipeline, embedded_checkpoint
from transformers_llada_uni.fingerprints import fingerprint, weights_fingerprint
from transformers_llada_uni.generation.configuration import BlockDiffusionGenerationConfig


class Holder:
    def __init__(self, held):
        self._held = held


def linear(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(3, 5)


def adding(number):
    return lambda value: value + number


# Each entry is another thing than all others.
DIFFERENT = [
    None,
    True,
    1,
    1.0,
    "1",
    b"1",
    [1, [2]],
    [1, 2],
    (1, 2),
    {"a": 1, "b": 2},
    {"a": 2, "b": 1},
    {1, 2},
    torch.float16,
    np.arange(4),
    np.arange(4).reshape(2, 2),
    torch.arange(4),
    torch.arange(4.0),
    torch.arange(4).to(torch.bfloat16),
    Image.new("RGB", (2, 2), "red"),
    Image.new("RGB", (2, 2), "blue"),
    Image.new("RGB", (4, 1), "blue"),
    BlockDiffusionGenerationConfig(),
    BlockDiffusionGenerationConfig(threshold=0.5),
    torch.Generator().manual_seed(1),
    torch.Generator().manual_seed(2),
    linear(0),
    linear(1),
    linear(0).to(torch.bfloat16),
    nn.Sequential(linear(0)),
    Holder(1),
    Holder(linear(0)),
    Holder(linear(1)),
    Decimal(1),
    Decimal(2),
    datetime.date(2026, 1, 1),
    datetime.date(2026, 1, 2),
    Path("a"),
    Path("b"),
    re.compile("a"),
    re.compile("b"),
    np.random.default_rng(1),
    np.random.default_rng(2),
    np.array([Decimal(1)]),
    np.array([Decimal(2)]),
    threading.Lock(),
    adding(1),
    adding(2),
    functools.partial(adding, 1),
    Holder(1).__init__,
    len,
    Holder,
]


def test_different_things_differ_and_equal_ones_do_not():
    prints = [fingerprint(thing) for thing in DIFFERENT]
    assert len(set(prints)) == len(DIFFERENT)
    uncopied = torch.Generator, type(threading.Lock())
    copied = [thing if isinstance(thing, uncopied) else copy.deepcopy(thing) for thing in DIFFERENT]
    assert [fingerprint(thing) for thing in copied] == prints
    assert fingerprint({"b": 2, "a": 1}) == fingerprint({"a": 1, "b": 2})  # the order of names says nothing


def test_another_process_gives_the_same():
    value = [{"b", "a", "c"}, 1.5, {"x": b"y"}, len]
    script = f"from transformers_llada_uni.fingerprints import fingerprint; print(fingerprint({value[:3]} + [len]))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == fingerprint(value)


def test_what_an_object_has_remembered_of_itself_says_nothing():
    path = Path("a/b")
    before = fingerprint(path)
    hash(path)
    assert fingerprint(path) == before


def test_an_object_may_hold_itself():
    ours = Holder(None)
    ours._held = [ours, 1]
    theirs = Holder(None)
    theirs._held = [theirs, 2]
    assert fingerprint(ours) != fingerprint(theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("place", [0, 20000, -1])
def test_one_changed_weight_is_noticed(dtype, place):
    module = nn.Module()
    module.register_buffer("weight", torch.arange(40002).to(dtype)[1:])  # nowhere near a multiple of anything
    before = weights_fingerprint(module)
    module.weight[place] = 3
    assert weights_fingerprint(module) != before
    before = weights_fingerprint(module)
    module.weight = module.weight.flip(0)
    assert weights_fingerprint(module) != before
    module.weight[[8, 10]] *= -1  # the upper bits of two words
    flipped = weights_fingerprint(module)
    module.weight[[8, 10]] *= -1
    assert weights_fingerprint(module) != flipped
    module.register_buffer("cache", torch.ones(1), persistent=False)
    middle = weights_fingerprint(module)
    module.cache += 1
    assert weights_fingerprint(module) == middle  # no part of the weights


def test_how_a_model_generates_is_noticed():
    model = nn.Linear(2, 2)
    prints = [fingerprint(model)]
    for settings in ({}, {"threshold": 0.5}, {"threshold": 0.5, "remasking_threshold": 0.05}):
        model.generation_config = BlockDiffusionGenerationConfig(**settings)
        prints.append(fingerprint(model))
    assert len(set(prints)) == 4


def test_names_and_the_share_of_an_adapter_are_noticed():
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=1, target_modules=["0"]))
    prints = [weights_fingerprint(model), weights_fingerprint(adapted)]
    adapted.base_model.model[0].scale_layer(0.5)
    prints.append(weights_fingerprint(adapted))
    with adapted.disable_adapter():
        prints.append(weights_fingerprint(adapted))
    assert len(set(prints)) == 4


def test_a_pipeline_is_what_it_is_made_of(tmp_path):
    pipeline = LLaDAUniPipeline.from_pretrained(embedded_checkpoint("emoji"))
    before = fingerprint(pipeline)
    pipeline.save_pretrained(tmp_path)
    other = LLaDAUniPipeline.from_pretrained(tmp_path)
    assert fingerprint(other) == before  # wherever it was loaded from
    cpu_offload(other.transformer, torch.device("cpu"))
    assert next(other.transformer.parameters()).is_meta and fingerprint(other) == before
    pipeline.processor.tokenizer("some words", truncation=True, max_length=64, padding="max_length")
    assert fingerprint(pipeline) == before  # a call changes the tokenizer's state, but not what it is
    with torch.no_grad():
        next(pipeline.transformer_turbo.parameters()).view(-1)[0] += 1
    assert fingerprint(pipeline) != before


def test_some_values_of_each_tensor_tell_training_from_none():
    module = linear()
    before = fingerprint([module, "settings"], 4)
    assert fingerprint([copy.deepcopy(module), "settings"], 4) == before != fingerprint([module, "settings"])
    with torch.no_grad():
        module.weight.add_(1e-3)
    assert fingerprint([module, "settings"], 4) != before
    large = torch.zeros(1000)
    some, every = fingerprint(large, 10), fingerprint(large)
    large[1] = 1.0
    assert fingerprint(large, 10) == some and fingerprint(large) != every
