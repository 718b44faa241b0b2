"""Settings for torch in a worker, which starts without it: applied when a task imports it, if one ever does."""

from __future__ import annotations

import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _TorchFinder(MetaPathFinder):
    """Finds torch where it would be found anyway, and sets it up once it is executed. It leaves no trace in the module."""

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            self._hook(spec.loader)
        return spec

    def _hook(self, loader: Loader) -> None:
        execute: Any = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module  # the instance's: this function
            execute(module)
            module.set_num_threads(self._num_threads)

        loader.exec_module = exec_module  # type: ignore[method-assign]  # of this one loader


def set_threads_when_imported(num_threads: int) -> None:
    """``torch.set_num_threads``, now or as soon as torch is imported."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(num_threads)
    else:
        sys.meta_path.insert(0, _TorchFinder(num_threads))
