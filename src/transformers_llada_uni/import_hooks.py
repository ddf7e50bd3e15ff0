"""Do something to a module when, or after, it is imported, without importing it."""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType


class _AfterImport(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Runs the ordinary import of the modules it knows, then what is to be done to them."""

    def __init__(self) -> None:
        self.actions: dict[str, list[Callable[[ModuleType], None]]] = {}
        self._loaders: dict[str, importlib.abc.Loader] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self.actions:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            self._loaders[fullname] = spec.loader
            spec.loader = self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loaders[spec.name].create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        # Whoever asks the module for its source (inspect, tracebacks) must find the real loader.
        module.__spec__.loader = module.__loader__ = self._loaders.pop(name)
        module.__loader__.exec_module(module)
        for action in self.actions.pop(name):
            action(sys.modules[name])  # a lazy package puts another module in the place of `module`


_finder = _AfterImport()


def after_import(module_name: str, action: Callable[[ModuleType], None]) -> None:
    """
    Calls `action(module)`: at once if the module is loaded, else as soon as it is.

    Args:
        module_name (`str`): Full name of the module.
        action (`Callable`): What to do to it. Must not import what the module itself is imported by.
    """
    if module_name in sys.modules:
        action(sys.modules[module_name])
        return
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    _finder.actions.setdefault(module_name, []).append(action)
