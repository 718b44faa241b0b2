"""Every class that a public function returns can be imported from ``stager``."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterator
from typing import Any

import pytest

import stager

_LIBRARIES = (
    "builtins",
    "collections",
    "concurrent",
    "datetime",
    "enum",
    "os",
    "pathlib",
    "signal",
    "torch",
    "types",
    "typing",
)


def _returned(value: Any) -> Iterator[tuple[str, Any]]:
    """The return annotations of a function, or of a class's public methods and properties; and the class's fields."""
    if inspect.isfunction(value):
        yield value.__qualname__, typing.get_type_hints(value).get("return")
    elif inspect.isclass(value):
        for name, hint in typing.get_type_hints(value).items():
            yield f"{value.__qualname__}.{name}", hint
        for base in value.__mro__:
            for name, member in vars(base).items() if base.__module__.startswith("stager") else ():
                function = getattr(member, "fget", None) or getattr(member, "__func__", None) or member
                if inspect.isfunction(function) and not name.startswith("_"):
                    yield function.__qualname__, typing.get_type_hints(function).get("return")


def _classes(annotation: Any) -> Iterator[type]:
    """The classes that an annotation names, those in brackets too."""
    for one in typing.get_args(annotation) if typing.get_origin(annotation) is not typing.Literal else ():
        yield from _classes(one)
    if inspect.isclass(origin := typing.get_origin(annotation) or annotation):
        yield origin


def _hidden(name: str) -> set[str]:
    """The classes that users get by a public name and cannot import from ``stager``."""
    return {
        f"{where}: {one.__module__}.{one.__qualname__}"
        for where, annotation in _returned(getattr(stager, name))
        if not where.rpartition(".")[2].startswith("_")
        for one in _classes(annotation)
        if getattr(stager, one.__name__, None) is not one
        and one.__module__.partition(".")[0] not in _LIBRARIES
        and one.__module__.rpartition(".")[0]
        != "stager.config"  # its sections: users write them in YAML, or import that
    }


@pytest.mark.parametrize("name", stager.__all__)
def test_classes_that_a_public_name_returns_are_exported(name: str) -> None:
    assert _hidden(name) == set()


def test_class_that_is_not_exported_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stager, "Loaded", None)
    assert _hidden("load_checkpoint") == {"load_checkpoint: stager.loading.loaded.Loaded"}


def test_every_public_name_has_a_summary_line() -> None:
    values = {name: getattr(stager, name) for name in stager.__all__ if name != "__version__"}
    lines = {name: (value.__doc__ or "").strip().partition("\n")[0] for name, value in values.items()}
    assert {name for name, line in lines.items() if not line or line.startswith(("Args:", "Attributes:"))} == set()
