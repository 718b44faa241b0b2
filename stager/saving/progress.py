"""Progress for whoever waits for saves: ``close()``, and a ``save()`` that waits for a buffer (``telemetry.progress``)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from stager.config.sizes import format_bytes
from stager.saving.save import Save
from stager.telemetry.report import SaveState

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_DELAY_SECS = 0.5  # most waits are shorter, and a bar that flickers tells nothing
_PER_SEC = 4
_BAR_CHARS = 30
_BEFORE_WRITING = {SaveState.PLANNED: "waiting for a buffer", SaveState.STAGING: "copying"}


def standard_error() -> Console:
    """The console of the process."""
    from rich.console import Console

    return Console(stderr=True)


class SaveProgress:
    """Shows the saves in flight on a terminal or in a notebook, and nowhere else.

    Args:
        is_on: ``telemetry.progress``.
        in_flight: the saves to show; called several times a second.
        make_console: says where.
    """

    def __init__(
        self,
        is_on: bool,
        in_flight: Callable[[], Iterable[Save]],
        make_console: Callable[[], Console] = standard_error,
    ) -> None:
        self._is_on = is_on
        self._in_flight = in_flight
        self._make_console = make_console

    @contextmanager
    def shown(self, what: str) -> Iterator[None]:
        """Show progress while the block runs, once that has taken half a second.

        Args:
            what: is done meanwhile, "closing" for example.
        """
        console = self._make_console() if self._is_on else None
        if console is None or not (console.is_terminal or console.is_jupyter):
            yield
            return
        ended = threading.Event()
        thread = threading.Thread(target=self._show, args=(console, what, ended), name="stager-progress", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the interpreter is shutting down, or no thread can be had
            yield
            return
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _show(self, console: Console, what: str, ended: threading.Event) -> None:
        from rich.live import Live

        started = time.monotonic()
        if ended.wait(_DELAY_SECS):
            return
        with Live(console=console, auto_refresh=False, transient=True) as live:
            while not ended.wait(1 / _PER_SEC):
                live.update(self.table(f"{what}, {time.monotonic() - started:.0f} s"), refresh=True)

    def table(self, title: str) -> Table:
        """Draw a line for each save in flight: its size, what is done with it now, and how many of its parts are written."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 1))
        for save in sorted(self._in_flight(), key=lambda one: one.timeline.started):
            report, done, num_parts = save.report, *save.parts
            doing = _BEFORE_WRITING.get(report.state, f"{done} of {num_parts} parts written")
            bar = ProgressBar(total=max(1, num_parts), completed=done, width=_BAR_CHARS)
            table.add_row(f"step {report.step}", format_bytes(report.nbytes), bar, doing)
        return table
