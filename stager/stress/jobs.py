"""The jobs of the fork server's children, by name. The server imports this before its first fork."""

from __future__ import annotations

import json
import mmap
import os
import time
from collections.abc import Callable
from typing import Any

import torch

from stager import Checkpointer
from stager.stress.checker import run_check
from stager.stress.episode import Episode
from stager.stress.trainer import run_trainer
from stager.stress.training import digests_of


def run_job(name: str, arguments: dict[str, Any]) -> None:
    """Do the job of this name in the calling process.

    Raises:
        KeyError: there is no job of this name.
    """
    torch.set_num_threads(1)
    _JOBS[name](arguments)


def write_result(path: str, result: Any) -> None:
    """Write a result atomically."""
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        json.dump(result, file)
    os.rename(f"{path}.tmp", path)


def _reference(arguments: dict[str, Any]) -> None:
    """Hash the state after every step of a run without faults."""
    with open(arguments["plan"], "rb") as file:
        episode = Episode.from_json(file.read())
    write_result(arguments["result"], list(digests_of(episode.training, episode.num_steps)))


def _check(arguments: dict[str, Any]) -> None:
    write_result(arguments["result"], run_check(arguments))


def _sweep(arguments: dict[str, Any]) -> None:
    """Open and close a Checkpointer, which cleans up after earlier runs."""
    config = arguments["config"] | {"workers": arguments["config"]["workers"] | {"count": 1}}
    with Checkpointer(arguments["directory"], config):
        pass


def _hog(arguments: dict[str, Any]) -> None:
    """Allocate memory, touch all of it, and keep it for a while."""
    nbytes = arguments["nbytes"]
    with mmap.mmap(-1, nbytes) as memory:
        for offset in range(0, nbytes, mmap.PAGESIZE):
            memory[offset] = 1
        time.sleep(arguments["secs"])


_JOBS: dict[str, Callable[[dict[str, Any]], None]] = {
    "trainer": run_trainer,
    "reference": _reference,
    "check": _check,
    "sweep": _sweep,
    "hog": _hog,
}
