"""Making a mistake, and collecting all that is said: what is raised, at once or in a Future, what is warned and logged."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import shlex
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException

from tests.mistakes.home import Home
from tests.mistakes.mistake import Kind, Mistake

_MAX_LINES = 14  # of a message


def outcome_of(mistake: Mistake, home: Home) -> str:
    """What is said, line by line; empty if nothing is."""
    make = {Kind.PYTHON: _run, Kind.COMMAND: _invoke, Kind.SETTINGS: _configure}[mistake.kind]
    said: list[str] = []
    with _listening(said):
        make(mistake, home, said.append)
    lines = home.normal("\n".join(dict.fromkeys(said))).rstrip().splitlines()
    more = [f"... and {len(lines) - _MAX_LINES} more lines"] if len(lines) > _MAX_LINES else []
    return "\n".join([line.rstrip() for line in lines[:_MAX_LINES]] + more)


def _run(mistake: Mistake, home: Home, say: Callable[[str], None]) -> None:
    printed = io.StringIO()
    raised: BaseException | None = None
    with home.names_for(mistake.code) as names, _as_main(names) as main:
        try:
            with contextlib.redirect_stdout(printed):
                exec(compile(mistake.code, "train.py", "exec"), main)
        except (Exception, CheckpointException) as error:  # noqa: BLE001  # it is what this is about
            raised = error
        failed = [handle.upload_completion.exception(timeout=60) for handle in home.handles]
        home.wait_until_judged()  # a save that failed is logged behind its Future
        if raised is not None:
            say(_name(raised))
        if printed.getvalue():
            say(f"printed: {printed.getvalue().rstrip()}")
        for error in filter(None, failed):
            say(f"in upload_completion: {_name(error)}")


@contextmanager
def _as_main(names: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A main module with these names, so that its classes can be pickled as those of a script."""
    before, main = sys.modules["__main__"], types.ModuleType("__main__")
    main.__dict__.update(names)
    sys.modules["__main__"] = main
    try:
        yield main.__dict__
    finally:
        sys.modules["__main__"] = before


def _invoke(mistake: Mistake, home: Home, say: Callable[[str], None]) -> None:
    from typer.testing import CliRunner

    from stager.cli import app

    program, *arguments = shlex.split(mistake.code)
    assert program == "stager"
    with home.names_for("") as _:
        result = CliRunner().invoke(app, arguments, prog_name="stager", env={"COLUMNS": "160", "NO_COLOR": "1"})
        assert result.exception is None or isinstance(result.exception, SystemExit), mistake.code
        # click draws a box around what it says of wrong options
        plain = re.sub(r"[╭╮╰╯─│]+", "", result.output)
        lines = [line.strip() for line in plain.splitlines() if line.strip()]
        say("\n".join([*lines, f"(exit code {result.exit_code})"]) if result.exit_code else "")
        sys.modules.pop("train", None)
        sys.path[:] = [path for path in sys.path if path != str(home.directory)]


def _configure(mistake: Mistake, home: Home, say: Callable[[str], None]) -> None:
    from stager import load_config

    with home.names_for(""):
        Path("stager.yaml").write_text(mistake.code + "\n")
        try:
            load_config("stager.yaml", environ={})
        except Exception as error:  # noqa: BLE001  # it is what this is about
            say(_name(error))


def _name(error: BaseException) -> str:
    """As a traceback ends."""
    module = type(error).__module__
    name = type(error).__name__
    text = str(error)
    if isinstance(error, CheckpointException):  # torch puts whole tracebacks into its text
        text = text.rstrip().rpartition("\n")[2]
    full = name if module == "builtins" else f"{module.partition('.')[0]}.{name}"
    return f"{full}: {text}" if text else full


@contextmanager
def _listening(said: list[str]) -> Iterator[None]:
    """Collect warnings, and what is logged."""

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(f"{record.levelname.lower()} in the log: {record.getMessage()}")

    logger, listener = logging.getLogger("stager"), Listener(logging.WARNING)
    environ = dict(os.environ)
    logger.addHandler(listener)
    propagate, logger.propagate = logger.propagate, False
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            yield
        said.extend(f"{one.category.__name__}: {one.message}" for one in warned if _is_ours(one))
    finally:
        logger.removeHandler(listener)
        logger.propagate = propagate
        os.environ.clear()
        os.environ.update(environ)


def _is_ours(warning: warnings.WarningMessage) -> bool:
    """Not Python's, of a file that a mistake left open; nor torch's, that there is no process group."""
    theirs = issubclass(warning.category, (ResourceWarning, DeprecationWarning))
    return not theirs and "torch.distributed is disabled" not in str(warning.message)
