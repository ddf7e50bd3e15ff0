"""Packages whose names are imported when they are first used (PEP 562)."""

import importlib
from collections.abc import Callable
from typing import Any


def attach(namespace: dict[str, Any], exports: dict[str, list[str]]) -> tuple[Callable, Callable, list[str]]:
    """
    What a package's `__init__.py` needs to import its modules late.

    Args:
        namespace: The package's `globals()`.
        exports: The public names of each of its modules.

    Returns:
        `__getattr__`, `__dir__` and `__all__` of the package.
    """
    package = namespace["__name__"]
    module_of = {name: module for module, names in exports.items() for name in names}
    public = sorted(module_of)

    def getattr_(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f".{module_of[name]}", package), name)
        namespace[name] = value
        return value

    def dir_() -> list[str]:
        return sorted([*namespace, *public])

    return getattr_, dir_, public
