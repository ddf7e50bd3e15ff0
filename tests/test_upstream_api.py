"""The private names of other libraries that the code leans on are those that CONTRIBUTING.md lists."""

import ast
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, MethodType

import pytest

import diffusers_llada_uni
import llada_uni
import transformers_llada_uni


ROOT = Path(__file__).resolve().parents[1]
OURS = ("transformers_llada_uni", "diffusers_llada_uni", "llada_uni")
UPSTREAM = (
    "accelerate",
    "datasets",
    "diffusers",
    "fastapi",
    "gradio",
    "huggingface_hub",
    "lm_eval",
    "peft",
    "torch",
    "transformers",
    "trl",
    "typer",
)
# Without an underscore, and yet not for users
INTERNAL_MODULES = (
    "diffusers.pipelines.pipeline_loading_utils",
    "peft.tuners.tuners_utils",
    "peft.utils.other",
    "transformers.conversion_mapping",
    "transformers.core_model_loading",
    "transformers.distributed.checkpoint",
    "transformers.models.auto.modeling_auto",
    "transformers.quantizers.quantizers_utils",
    "transformers.utils.chat_template_utils",
    "transformers.utils.generic",
    "transformers.utils.output_capturing",
    "trl.scripts.grpo",
    "trl.trainer.utils",
)


def is_private(name: str) -> bool:
    return name.startswith("_") and name != "__version__"


def imported() -> Iterator[str]:
    """Private names that our files import."""
    for path in [*ROOT.glob("src/**/*.py"), *ROOT.glob("conversion/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in UPSTREAM:
                is_internal = node.module in INTERNAL_MODULES or any(map(is_private, node.module.split(".")))
                yield from (alias.name for alias in node.names if is_internal or is_private(alias.name))


def overridden() -> Iterator[str]:
    """Private methods of upstream's classes that ours replace."""
    for package in (transformers_llada_uni, diffusers_llada_uni, llada_uni):
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if found.name.endswith("__main__"):
                continue
            try:
                module = importlib.import_module(found.name)
            except ModuleNotFoundError as error:
                if error.name.split(".")[0] in OURS:
                    raise
                pytest.skip(f"{error.name} is not installed")
            for own in vars(module).values():
                if inspect.isclass(own) and own.__module__ == module.__name__:
                    yield from _overridden_by(own)


def _overridden_by(own: type) -> Iterator[str]:
    for name in vars(own):
        if name.startswith("__") or not name.startswith("_"):
            continue
        base = next((base for base in own.__mro__[1:] if name in vars(base)), None)
        is_upstream = base is not None and base.__module__.split(".")[0] in UPSTREAM
        if is_upstream and isinstance(inspect.unwrap(getattr(own, name)), (FunctionType, MethodType, property)):
            yield name


def test_the_list_is_what_the_code_uses():
    section = (ROOT / "CONTRIBUTING.md").read_text().split("## Private upstream API\n")[1]
    rows = [line.split("|") for line in section.splitlines() if line.startswith("| ") and "---" not in line]
    listed = [name for row in rows for name in re.findall(r"`(\w+)`", row[2])]
    assert len(listed) == len(set(listed))
    used = {*imported(), *overridden()}
    assert {"unlisted": used - set(listed), "gone": set(listed) - used} == {"unlisted": set(), "gone": set()}
