"""Tests that need a GPU are imported, and run on the CPU: they cannot fall behind the code where there is none.

What they show on a GPU (pinned memory, streams) they do not show here; that they use names that exist, they do.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import cuda_runtime

_TESTS = Path(__file__).resolve().parents[1]
_MARK = "pytest.mark." + "gpu"  # in two parts: this file is none of those that are looked for


def _modules() -> list[str]:
    files = [path for path in _TESTS.rglob("test_*.py") if _MARK in path.read_text()]
    return [".".join(path.relative_to(_TESTS.parent).with_suffix("").parts) for path in sorted(files)]


def _cases() -> Iterator[Any]:
    for name in _modules():
        for test, function in vars(importlib.import_module(name)).items():
            if test.startswith("test_"):
                for number, arguments in enumerate(_arguments(function)):
                    yield pytest.param(function, arguments, id=f"{name}:{test}[{number}]")


def _arguments(function: Callable[..., None]) -> Iterator[dict[str, object]]:
    """Of each of its parametrizations."""
    marks = [mark for mark in getattr(function, "pytestmark", []) if mark.name == "parametrize"]
    for values in itertools.product(*(mark.args[1] for mark in marks)):
        yield {mark.args[0]: value for mark, value in zip(marks, values, strict=True)}


@pytest.fixture
def refusing_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA runtime that pins nothing."""
    cuda_runtime.install(monkeypatch, SimpleNamespace(cudaHostRegister=lambda *_: 1))


@pytest.mark.usefixtures("refusing_cuda")
@pytest.mark.filterwarnings("ignore:pin_memory=True is ignored:UserWarning")
@pytest.mark.parametrize(("function", "arguments"), list(_cases()))
def test_runs_on_the_cpu(
    function: Callable[..., None], arguments: dict[str, object], request: pytest.FixtureRequest
) -> None:
    for name in inspect.signature(function).parameters:
        if name not in arguments:
            arguments = {**arguments, name: "cpu" if name == "device" else request.getfixturevalue(name)}
    assert "device" in arguments, "it cannot be told to use the CPU"
    function(**arguments)


def test_both_places_are_looked_at() -> None:
    assert {"tests.gpu.test_cuda_snapshot", "tests.staging.test_gpu"} <= set(_modules())
