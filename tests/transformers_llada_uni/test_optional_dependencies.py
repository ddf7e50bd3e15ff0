"""Missing extras name themselves."""

import importlib
import re
import sys
import tomllib
from pathlib import Path

import pytest

from transformers_llada_uni import optional_dependencies
from transformers_llada_uni.optional_dependencies import require_extra


def test_missing_packages_are_named_with_their_extra():
    require_extra("train", "torch", "transformers")
    message = r'^`no_such` and `nor_this` not installed: pip install "llada-uni\[evaluation\]"$'
    with pytest.raises(ModuleNotFoundError, match=message) as raised:
        require_extra("evaluation", "torch", "no_such", "nor_this")
    assert raised.value.name == "no_such"


def test_an_extra_brings_what_is_asked_of_it():
    root = Path(__file__).parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    num_calls = 0
    for file in (root / "src").rglob("*.py"):
        for extra, packages in re.findall(r'^ *require_extra\("(\w+)", (.*)\)$', file.read_text(), re.MULTILINE):
            num_calls += 1
            brought = {re.match(r"[\w-]+", package)[0] for package in project["optional-dependencies"][extra]}
            assert {name.replace("_", "-") for name in re.findall(r'"(\w+)"', packages)} <= brought, file
    assert num_calls >= 5


@pytest.mark.parametrize(("package", "module"), [("trl", ""), ("evaluate", ""), ("lm_eval", ".lm_eval_model")])
def test_evaluation_says_what_to_install(monkeypatch, package, module):
    name = "transformers_llada_uni.evaluation" + module
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(optional_dependencies, "find_spec", lambda asked: None if asked == package else asked)
    with pytest.raises(ModuleNotFoundError, match=rf'^`{package}` not installed: pip install "llada-uni\[evaluation'):
        importlib.import_module(name)
