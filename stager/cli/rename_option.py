"""``--rename``: a file of names, or a function of the user."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import ModuleType

_ENDINGS = (".json", ".yaml", ".yml")
_FORM = "give a .json or .yaml file of old names and new ones, or a function as module:function or file.py:function"


def read_rename(text: str) -> Mapping[str, str | None] | Callable[[str], str | None]:
    """Return what ``--rename`` names. A function's module is imported: its code runs.

    Raises:
        UsageError: there is no such file or function, or the file is no mapping of names.
        StorageError: the file cannot be read.
    """
    from stager.workers.errors import UsageError

    if text.lower().endswith(_ENDINGS):
        return _mapping(text)
    module, colon, name = text.rpartition(":")
    if not colon or not module or not name:
        raise UsageError(f"--rename {text}: names neither a file nor a function; {_FORM}")
    found: Any = _module(module, text)
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise UsageError(f"--rename {text}: {module} has no function {name}; {_FORM}")
    function: Callable[[str], str | None] = found
    return function


def _mapping(path: str) -> Mapping[str, str | None]:
    import yaml

    from stager.workers.checkpoint.storage.posix.files import storage_errors
    from stager.workers.errors import UsageError

    with storage_errors("read", path), open(path, encoding="utf-8") as file:
        text = file.read()
    try:
        names = yaml.safe_load(text)  # JSON is YAML, too
    except yaml.YAMLError as error:
        raise UsageError(f"--rename {path}: is neither JSON nor YAML: {error}") from error
    if not isinstance(names, dict) or not names:
        raise UsageError(f"--rename {path}: has no mapping of names; write lines such as 'old.name: new.name'")
    for old, new in names.items():
        if not isinstance(old, str) or not (new is None or (isinstance(new, str) and new)):
            raise UsageError(
                f"--rename {path}: has {old!r}: {new!r}; both are texts, or the new name is null, which leaves the weight "
                "out"
            )
    return names


def _module(name: str, text: str) -> ModuleType:
    from stager.workers.errors import UsageError

    try:
        if name.endswith(".py"):
            return _of_file(name)
        if (directory := os.getcwd()) not in sys.path:  # as `python -m` does
            sys.path.insert(0, directory)
        return importlib.import_module(name)
    except Exception as error:
        raise UsageError(f"--rename {text}: cannot import {name} ({type(error).__name__}: {error}); {_FORM}") from error


def _of_file(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("_stager_rename", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
