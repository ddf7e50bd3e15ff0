"""
Lets `DiffusionPipeline.from_pretrained` find `LLaDAUniPipeline`, without importing diffusers (and so torch).

diffusers takes the class named in `model_index.json` as an attribute of the `diffusers` module, whose attributes are
imported when first asked for: a table maps class names to submodules. We add our name to that table, and let the
submodule's name lead to this package. The components' modules must be imported by then (diffusers looks in
`sys.modules` only); `pipeline_llada_uni` imports them all.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType


PACKAGE = "diffusers_llada_uni"
PIPELINES = ("LLaDAUniPipeline",)
SUBMODULE = "pipelines.llada_uni"


def _add_names(diffusers: ModuleType) -> None:
    if hasattr(diffusers, "_class_to_module"):
        diffusers._class_to_module.update(dict.fromkeys(PIPELINES, SUBMODULE))
        return
    # DIFFUSERS_SLOW_IMPORT=1 makes diffusers an ordinary module, which has no table.
    for name in PIPELINES:
        setattr(diffusers, name, getattr(sys.modules[PACKAGE], name))


class _AddNamesAfterImport(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Runs the ordinary import of diffusers, then adds our names to it."""

    def __init__(self) -> None:
        self._loader: importlib.abc.Loader | None = None

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "diffusers":
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            self._loader = spec.loader
            spec.loader = self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # Whoever asks the module for its source (inspect, tracebacks) must find the real loader.
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _add_names(sys.modules["diffusers"])  # diffusers puts a lazy module in the place of `module`


def register() -> None:
    """Adds our pipeline to diffusers, now or, where diffusers is not loaded yet, as soon as it is."""
    sys.modules.setdefault(f"diffusers.{SUBMODULE}", sys.modules[PACKAGE])
    if "diffusers" in sys.modules:
        _add_names(sys.modules["diffusers"])
    elif not any(isinstance(finder, _AddNamesAfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AddNamesAfterImport())
