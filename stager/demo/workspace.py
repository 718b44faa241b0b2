"""The directory a demo works in: what is where, and how it is made ready without touching anything of the user's."""

from __future__ import annotations

import errno
import shutil
from dataclasses import dataclass
from pathlib import Path

from stager.config.sizes import format_bytes
from stager.copying import copy_checkpoints
from stager.demo.config import DemoConfig
from stager.operations import prune, recover
from stager.workers.checkpoint.directory.run_directory import committed_steps
from stager.workers.checkpoint.maintenance.retention import remove
from stager.workers.checkpoint.storage.places import storage_of
from stager.workers.errors import StorageError, UsageError

CHECKPOINTS_KEPT = 3
FREE_SPACE_FACTOR = 1.1  # metadata, logs, and what a file system needs beside the bytes


@dataclass(frozen=True)
class Workspace:
    """Paths of one demo.

    Attributes:
        store: URL in an object store, under which the checkpoints are; "": they are under ``root``.
    """

    root: Path
    store: str = ""

    @property
    def config(self) -> Path:
        """The configuration, for the jobs; its presence marks a directory as a demo's."""
        return self.root / "demo-config.json"

    @property
    def checkpoints(self) -> str:
        """The checkpoints of the killed and resumed run: a path, or a URL."""
        return f"{self.store or self.root}/checkpoints"

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
        prune(self.checkpoints, keep_latest=CHECKPOINTS_KEPT, full=False)

    def copy_here(self, name: str, directory: Path) -> Path:
        """Copy a checkpoint into a directory of this host; returns the path of the copy."""
        copy = directory / name
        if self.store:
            copy_checkpoints(f"{self.checkpoints}/{name}", directory)
        else:
            shutil.copytree(f"{self.checkpoints}/{name}", copy)  # it can be copied like any other directory
        return copy

    @staticmethod
    def prepare(root: Path, config: DemoConfig, store: str = "") -> Workspace:
        """Return an empty workspace; what an earlier demo left in ``root`` is removed.

        Raises:
            UsageError: ``root`` holds something else.
            StorageError: it has too little free space.
        """
        workspace = Workspace(root.absolute(), store)
        root.mkdir(parents=True, exist_ok=True)
        if workspace.config.exists():
            workspace._clear()
        elif any(root.iterdir()):
            raise UsageError(f"{root} is not empty and not from an earlier demo; choose another directory or empty it")
        if store:
            workspace._clear_store()
        workspace._check_free_space(config)
        workspace.measured.mkdir()
        workspace.config.write_text(config.model_dump_json(indent=2), encoding="utf-8")
        return workspace

    def _clear(self) -> None:
        for directory in (self.root / "checkpoints", self.measured, self.root / "runs"):
            shutil.rmtree(directory, ignore_errors=True)
        for file in (self.chart, self.results, self.config):
            file.unlink(missing_ok=True)

    def _clear_store(self) -> None:
        """Remove the checkpoints that an earlier demo has left there."""
        for step in committed_steps(self.checkpoints):
            remove(self.checkpoints, step)
        if storage_of(self.checkpoints).has_directory(self.checkpoints):
            recover(self.checkpoints)

    def _check_free_space(self, config: DemoConfig) -> None:
        needed = int(config.demo.max_copies * config.demo.checkpoint_nbytes * FREE_SPACE_FACTOR)
        free = shutil.disk_usage(self.root).free
        if free < needed:
            raise StorageError(
                errno.ENOSPC,
                f"the demo writes up to {format_bytes(needed)} here and {format_bytes(free)} are free",
                str(self.root),
            )
