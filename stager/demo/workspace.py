"""The directory a demo works in: what is where, and how it is made ready without touching anything of the user's."""

from __future__ import annotations

import errno
import shutil
from dataclasses import dataclass
from pathlib import Path

from stager.config.sizes import format_bytes
from stager.demo.config import DemoConfig
from stager.workers.errors import StorageError, UsageError

CHECKPOINTS_KEPT = 3
FREE_SPACE_FACTOR = 1.1  # metadata, logs, and what a file system needs beside the bytes


@dataclass(frozen=True)
class Workspace:
    """Paths of one demo."""

    root: Path

    @property
    def config(self) -> Path:
        """The configuration, for the jobs; its presence marks a directory as a demo's."""
        return self.root / "demo-config.json"

    @property
    def checkpoints(self) -> Path:
        """The checkpoints of the killed and resumed run."""
        return self.root / "checkpoints"

    @property
    def measured(self) -> Path:
        """Where the measured saves go, one at a time."""
        return self.root / "measured"

    @property
    def chart(self) -> Path:
        return self.root / "demo.png"

    @property
    def results(self) -> Path:
        return self.root / "results.json"

    def run(self, name: str) -> Path:
        """Return the directory of one leg, made if need be: losses, final state, log."""
        directory = self.root / "runs" / name
        directory.mkdir(parents=True, exist_ok=True)
        return directory

    def remove_old_checkpoints(self) -> None:
        """Remove all checkpoints but the last few, which are left to look at."""
        for checkpoint in sorted(self.checkpoints.glob("step-????????"))[:-CHECKPOINTS_KEPT]:
            shutil.rmtree(checkpoint)

    @staticmethod
    def prepare(root: Path, config: DemoConfig) -> Workspace:
        """Return an empty workspace; what an earlier demo left in ``root`` is removed.

        Raises:
            UsageError: ``root`` holds something else.
            StorageError: it has too little free space.
        """
        workspace = Workspace(root.absolute())
        root.mkdir(parents=True, exist_ok=True)
        if workspace.config.exists():
            workspace._clear()
        elif any(root.iterdir()):
            raise UsageError(f"{root} is not empty and not from an earlier demo; choose another directory or empty it")
        workspace._check_free_space(config)
        workspace.measured.mkdir()
        workspace.config.write_text(config.model_dump_json(indent=2), encoding="utf-8")
        return workspace

    def _clear(self) -> None:
        for directory in (self.checkpoints, self.measured, self.root / "runs"):
            shutil.rmtree(directory, ignore_errors=True)
        for file in (self.chart, self.results, self.config):
            file.unlink(missing_ok=True)

    def _check_free_space(self, config: DemoConfig) -> None:
        needed = int(config.demo.max_copies * config.demo.checkpoint_nbytes * FREE_SPACE_FACTOR)
        free = shutil.disk_usage(self.root).free
        if free < needed:
            raise StorageError(
                errno.ENOSPC,
                f"the demo writes up to {format_bytes(needed)} here and {format_bytes(free)} are free",
                str(self.root),
            )
