"""The progress bars of the demo, one per act."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from typing_extensions import Self


class Bars:
    """One bar per act, added when the act begins.  Used as a context manager."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[status]}"),
            console=console,
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def begin(self, title: str, total: int) -> Bar:
        """Add a bar; ``total`` is the number of units of work in the act."""
        task = self._progress.add_task(title, total=total, status="")
        return Bar(self._progress, task)


class Bar:
    """The bar of one act."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task

    def advance(self, units: int = 1) -> None:
        """Show that more of the work is done."""
        self._progress.advance(self._task, units)

    def reach(self, completed: int) -> None:
        """Show how much of the work is done in all."""
        self._progress.update(self._task, completed=completed)

    def say(self, status: str) -> None:
        """Show a status beside the bar."""
        self._progress.update(self._task, status=status)

    def end(self) -> None:
        """Stop the clock of an act that is over, whether its bar is full or not."""
        self._progress.stop_task(self._task)
