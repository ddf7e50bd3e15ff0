"""Missing extras name themselves."""

import importlib
import sys

import pytest

from transformers_llada_uni import optional_dependencies
from transformers_llada_uni.optional_dependencies import require_extra


def test_missing_packages_are_named_with_their_extra():
    require_extra("train", "torch", "transformers")
    message = r'^`no_such` and `nor_this` not installed: pip install "llada-uni\[evaluation\]"$'
    with pytest.raises(ModuleNotFoundError, match=message) as raised:
        require_extra("evaluation", "torch", "no_such", "nor_this")
    assert raised.value.name == "no_such"


@pytest.mark.parametrize(("package", "module"), [("trl", ""), ("evaluate", ""), ("lm_eval", ".lm_eval_model")])
def test_evaluation_says_what_to_install(monkeypatch, package, module):
    name = "transformers_llada_uni.evaluation" + module
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(optional_dependencies, "find_spec", lambda asked: None if asked == package else asked)
    with pytest.raises(ModuleNotFoundError, match=rf'^`{package}` not installed: pip install "llada-uni\[evaluation'):
        importlib.import_module(name)
