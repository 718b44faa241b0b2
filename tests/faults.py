"""Arming the fault points of :mod:`stager.workers.faults` from a test."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stager.workers import faults


class Faults:
    """A directory of armed points, in the environment of this process and of those it starts."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.directory = directory
        directory.mkdir()
        monkeypatch.setenv("STAGER_FAULTS", str(directory))
        monkeypatch.setattr(faults, "_DIRECTORY", str(directory))
        monkeypatch.setattr(faults, "_visits", type(faults._visits)())

    def arm(self, point: str, action: str) -> None:
        """The first process that reaches ``point`` does ``action``, once."""
        temporary = self.directory / f".{point}"
        temporary.write_text(action)
        temporary.rename(self.directory / point)

    def fired(self, point: str) -> bool:
        return not (self.directory / point).exists()

    def hold(self, point: str, after: int = 0) -> Hold:
        """The first process that reaches ``point``, for the ``after + 1``-th time, stays there until it is released."""
        hold = Hold(self.directory / f"hold-{point}")
        self.arm(point, f"hold {hold.path} after={after}")
        return hold


def faults_of_this_process(directory: Path) -> Faults:
    """In a child of a test, which ends with it: nothing is put back."""
    return Faults(directory, pytest.MonkeyPatch())


class Hold:
    """One process, held at a point. As a context manager it lets the process go when a test fails, so that none hangs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._holds = False
        os.mkfifo(f"{path}.reached")
        os.mkfifo(f"{path}.go")

    def wait(self) -> None:
        """Until a process is there."""
        with open(f"{self.path}.reached"):
            pass
        self._holds = True

    def release(self) -> None:
        with open(f"{self.path}.go", "w"):
            pass
        self._holds = False

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *_: object) -> None:
        if self._holds:
            self.release()

    def remove(self) -> None:
        """So that the same point can be held again."""
        os.unlink(f"{self.path}.reached")
        os.unlink(f"{self.path}.go")
