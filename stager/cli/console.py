"""Where commands print to: results on stdout; progress and errors on stderr, so that pipes carry results only."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

_PIPED_WIDTH_CHARS = 200  # rich would fold tables at 80 characters, which grep and other programs cannot read


def stdout() -> Console:
    """The console for results."""
    return _console(sys.stdout.isatty())


def stderr() -> Console:
    """The console for progress and errors."""
    return _console(sys.stderr.isatty(), stderr=True)


def _console(terminal: bool, **options: Any) -> Console:
    from rich.console import Console

    piped = not terminal and "COLUMNS" not in os.environ
    return Console(width=_PIPED_WIDTH_CHARS if piped else None, highlight=False, **options)


def print_json(value: Any) -> None:
    """Print a value as JSON on stdout."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def print_error(message: str) -> None:
    """Print an error on stderr, on one line, so that scripts can search it."""
    sys.stderr.write(f"stager: {message.encode(errors='backslashreplace').decode()}\n")


def printable(text: object) -> str:
    """Return ``text`` with control characters and undecodable bytes escaped.

    Names come from checkpoints that may be hostile: an escape sequence in one would reach the terminal.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def byte_progress() -> Progress:
    """A progress bar over bytes, on stderr; silent unless stderr is a terminal."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = stderr()
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
