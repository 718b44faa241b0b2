"""What the fork server's children do, by name. All of it is imported before the first fork."""

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
    """Raises: KeyError: there is no such job."""
    torch.set_num_threads(1)
    _JOBS[name](arguments)


def write_result(path: str, result: Any) -> None:
    """There whole, or not at all."""
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        json.dump(result, file)
    os.rename(f"{path}.tmp", path)


def _reference(arguments: dict[str, Any]) -> None:
    """The hash of the state after every step of a run that nothing disturbs."""
    with open(arguments["plan"], "rb") as file:
        episode = Episode.from_json(file.read())
    write_result(arguments["result"], list(digests_of(episode.training, episode.num_steps)))


def _check(arguments: dict[str, Any]) -> None:
    write_result(arguments["result"], run_check(arguments))


def _sweep(arguments: dict[str, Any]) -> None:
    """A next run that does nothing: it cleans up after those before."""
    config = arguments["config"] | {"workers": arguments["config"]["workers"] | {"count": 1}}
    with Checkpointer(arguments["directory"], config):
        pass


def _hog(arguments: dict[str, Any]) -> None:
    """Take memory, touch all of it, keep it for a while."""
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
