"""Functions of the user's that an option names."""

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any


def user_function(path: str, option: str) -> Callable[..., Any]:
    """
    The function of a path `module.function`, seen from the working directory.

    Raises:
        ValueError: naming the option, if the path is none, or the module has no such function.
        ModuleNotFoundError: if there is no such module.
    """
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise ValueError(f"`{option}`: {path!r} is no path `module.function`.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    module = importlib.import_module(module_name)
    if not callable(function := getattr(module, name, None)):
        raise ValueError(f"`{option}`: {module.__file__} has no function {name!r}.")
    return function
