"""Listeners that write finished saves to files: JSON lines, and a Chrome trace (for Perfetto, beside a torch profile)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict

from stager.telemetry.event import CommittedEvent, Event, FailedEvent
from stager.telemetry.report import SaveReport

Path = str | os.PathLike[str]


class FileSink:
    """Writes the lines of each finished save to a file.

    Args:
        path: of the file.
        mode: "a" appends, "w" begins anew.
        lines_of: makes the lines of a save.
        head: of a new file.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path, mode: str, lines_of: Callable[[SaveReport], list[str]], head: str = "") -> None:
        self._lines_of = lines_of
        with ExitStack() as opened:
            self._file = opened.enter_context(open(path, mode, encoding="utf-8"))
            self._file.write(head)
            self._opened = opened.pop_all()

    def __call__(self, event: Event) -> None:
        """Write the lines of a save that has ended; OSError if that is impossible."""
        if isinstance(event, CommittedEvent | FailedEvent):
            self._file.writelines(self._lines_of(event.report))
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._opened.close()


def json_lines(path: Path) -> FileSink:
    """A file to which each finished save appends its report, as one line of JSON."""
    return FileSink(path, "a", lambda report: [json.dumps(asdict(report)) + "\n"])


def chrome_trace(path: Path) -> FileSink:
    """A file of timings in the Trace Event Format, JSON array form, which may stay unclosed."""
    return FileSink(path, "w", _trace_lines, "[\n")


def _trace_lines(report: SaveReport) -> list[str]:
    """Return one line for each timing: complete events ("ph": "X") of Chrome's trace format; times in microseconds."""
    common = {"cat": "stager", "ph": "X", "pid": os.getpid()}
    rows = (
        {
            "name": f"{timing.name} {report.step}",
            **common,
            "tid": timing.process,
            "ts": timing.start * 1e6,
            "dur": (timing.end - timing.start) * 1e6,
        }
        for timing in report.timings
    )
    return [json.dumps(row) + ",\n" for row in rows]
