"""Build and load the simulated accelerator, once for each version of torch."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from torch.utils import cpp_extension

_SOURCES = Path(__file__).parent / "simulator"
_BUILT = Path(__file__).parent / "built"  # not in the repository


class CannotBuildError(RuntimeError):
    """There is no compiler here, or no ninja."""


@cache
def load() -> ModuleType:
    """Build the extension if its sources have changed, and load it. After that this process has two devices of it.

    Raises:
        CannotBuildError
    """
    if shutil.which("c++") is None and shutil.which("g++") is None:
        raise CannotBuildError("the simulated accelerator needs a C++ compiler (Debian: apt-get install g++)")
    if not cpp_extension.is_ninja_available():
        raise CannotBuildError("the simulated accelerator needs ninja (pip install ninja)")
    directory = _BUILT / torch.__version__
    directory.mkdir(parents=True, exist_ok=True)
    return cpp_extension.load(
        name="stager_simulated_accelerator",
        sources=[str(source) for source in sorted(_SOURCES.glob("*.cpp"))],
        build_directory=str(directory),
        extra_cflags=["-O1", "-Wno-unknown-pragmas"],
    )
