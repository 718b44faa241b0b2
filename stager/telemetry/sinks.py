"""Where the events of finished saves go: JSON lines, and a Chrome trace that opens in Perfetto beside a torch profile."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import asdict

from stager.saving.save import SaveReport


class Telemetry:
    """Appends each finished save to the files that were asked for.

    Args:
        events: path of the JSONL file, one object per save; None: none.
        trace: path of the trace (Trace Event Format, JSON array form, which may stay unclosed); None: none.

    Raises:
        OSError: a file cannot be opened.
    """

    def __init__(self, events: str | os.PathLike[str] | None, trace: str | os.PathLike[str] | None) -> None:
        self._lock = threading.Lock()
        self._events = open(events, "a", encoding="utf-8") if events is not None else None  # noqa: SIM115  (kept open)
        self._trace = open(trace, "w", encoding="utf-8") if trace is not None else None  # noqa: SIM115  # kept open
        if self._trace is not None:
            self._trace.write("[\n")

    def record(self, report: SaveReport) -> None:
        with self._lock:
            if self._events is not None:
                self._events.write(json.dumps(asdict(report)) + "\n")
                self._events.flush()
            if self._trace is not None:
                self._trace.writelines(_trace_lines(report))
                self._trace.flush()

    def close(self) -> None:
        with self._lock:
            for file in (self._events, self._trace):
                if file is not None:
                    file.close()
            self._events = self._trace = None


def _trace_lines(report: SaveReport) -> list[str]:
    """Complete events ("ph": "X"), microseconds."""
    return [
        json.dumps(
            {
                "name": f"{event.name} {report.step}",
                "cat": "stager",
                "ph": "X",
                "pid": os.getpid(),
                "tid": event.process,
                "ts": event.start * 1e6,
                "dur": (event.end - event.start) * 1e6,
            }
        )
        + ",\n"
        for event in report.events
    ]
