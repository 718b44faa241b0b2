"""Where the events of finished saves go: JSON lines, and a Chrome trace that opens in Perfetto beside a torch profile."""

from __future__ import annotations

import json
import os
import threading
from contextlib import ExitStack
from dataclasses import asdict

from stager.telemetry.report import SaveReport


class Telemetry:
    """Appends each finished save to the configured files.

    Args:
        events: path of the JSONL file, one object per save; None: write none.
        trace: path of the trace (Trace Event Format, JSON array form, which may stay unclosed); None: write none.

    Raises:
        OSError: a file cannot be opened.
    """

    def __init__(self, events: str | os.PathLike[str] | None, trace: str | os.PathLike[str] | None) -> None:
        self._lock = threading.Lock()
        with ExitStack() as opened:  # closes the first file if the second cannot be opened
            self._events = None if events is None else opened.enter_context(open(events, "a", encoding="utf-8"))
            self._trace = None if trace is None else opened.enter_context(open(trace, "w", encoding="utf-8"))
            self._files = opened.pop_all()
        if self._trace is not None:
            self._trace.write("[\n")

    def record(self, report: SaveReport) -> None:
        """Write one finished save; OSError if a file cannot be written. Does nothing after :meth:`close`."""
        with self._lock:
            if self._events is not None:
                self._events.write(json.dumps(asdict(report)) + "\n")
                self._events.flush()
            if self._trace is not None:
                self._trace.writelines(_trace_lines(report))
                self._trace.flush()

    def close(self) -> None:
        """Close the files."""
        with self._lock:
            self._events = self._trace = None
            self._files.close()


def _trace_lines(report: SaveReport) -> list[str]:
    """Complete events ("ph": "X"); times in microseconds."""
    common = {"cat": "stager", "ph": "X", "pid": os.getpid()}
    rows = (
        {
            "name": f"{event.name} {report.step}",
            **common,
            "tid": event.process,
            "ts": event.start * 1e6,
            "dur": (event.end - event.start) * 1e6,
        }
        for event in report.events
    )
    return [json.dumps(row) + ",\n" for row in rows]
