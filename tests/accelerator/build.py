"""Build and load the simulated accelerator, once for each version of torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from torch.utils import cpp_extension

_SOURCES = Path(__file__).resolve().parent / "simulator"
_BUILT = _SOURCES.parent / "built"  # not in the repository


class CannotBuildError(RuntimeError):
    """There is no compiler here, or no ninja."""


def build() -> None:
    """Build the extension if its sources have changed, in a process that does not keep it.

    Raises:
        CannotBuildError
    """
    _check_tools()
    subprocess.run([sys.executable, "-m", "tests.accelerator.build"], cwd=_SOURCES.parents[2], check=True)


@cache
def load() -> ModuleType:
    """Build the extension if its sources have changed, and load it. After that this process has two devices of it.

    Raises:
        CannotBuildError
    """
    _check_tools()
    directory = _BUILT / torch.__version__
    directory.mkdir(parents=True, exist_ok=True)
    bin_directory = str(Path(sys.executable).parent)  # where pip put ninja, also without an activated environment
    if bin_directory not in os.environ["PATH"].split(os.pathsep):
        os.environ["PATH"] = f"{bin_directory}{os.pathsep}{os.environ['PATH']}"
    return cpp_extension.load(
        name="stager_simulated_accelerator",
        sources=[str(_SOURCES / "all.cpp")],
        build_directory=str(directory),
        extra_cflags=["-O1", "-Wno-unknown-pragmas"],
    )


def _check_tools() -> None:
    if shutil.which("c++") is None and shutil.which("g++") is None:
        raise CannotBuildError("the simulated accelerator needs a C++ compiler (Debian: apt-get install g++)")
    if shutil.which("ninja") is None and not (Path(sys.executable).parent / "ninja").exists():
        raise CannotBuildError("the simulated accelerator needs ninja (pip install ninja)")


if __name__ == "__main__":
    load()
