"""The ways to save and load that are measured side by side, each in its stock configuration."""

from __future__ import annotations

import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from stager import Checkpointer
from tests.benchmarks.cases import State


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds: how long the call blocked, and until the checkpoint was stored as well as the peer stores it."""

    blocked_secs: float
    stored_secs: float


@dataclass(frozen=True, slots=True)
class Peer:
    """``open(directory)`` yields ``save(step, state) -> Timing`` and ``load(step, state)``."""

    name: str
    synced: bool
    open: Callable[[Path], Iterator[tuple[Callable[[int, State], Timing], Callable[[int, State], None]]]]


@contextmanager
def _stager(directory: Path):  # type: ignore[no-untyped-def]
    with Checkpointer(directory) as ckpt:

        def save(step: int, state: State) -> Timing:
            started = time.perf_counter()
            handle = ckpt.save(step, state)
            blocked = time.perf_counter() - started
            path = handle.upload_completion.result().path
            stored = time.perf_counter() - started
            _keep_only(directory, Path(path))
            return Timing(blocked, stored)

        yield save, lambda step, state: ckpt.load(step, into=state)


@contextmanager
def _torch_save(directory: Path):  # type: ignore[no-untyped-def]
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "state.pt"

    def save(step: int, state: State) -> Timing:
        started = time.perf_counter()
        torch.save(state, path)
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        return Timing(*[time.perf_counter() - started] * 2)

    def load(step: int, state: State) -> None:
        loaded = torch.load(path, weights_only=True)
        for name, tensor in state.items():
            tensor.copy_(loaded[name])

    yield save, load


@contextmanager
def _dcp_async_save(directory: Path):  # type: ignore[no-untyped-def]
    def save(step: int, state: State) -> Timing:
        path = directory / str(step)
        started = time.perf_counter()
        future = dcp.async_save(state, checkpoint_id=str(path), no_dist=True)
        blocked = time.perf_counter() - started
        future.result()  # type: ignore[union-attr]
        stored = time.perf_counter() - started
        _keep_only(directory, path)
        return Timing(blocked, stored)

    yield save, lambda step, state: dcp.load(state, checkpoint_id=str(directory / str(step)), no_dist=True)


def _keep_only(directory: Path, path: Path) -> None:
    for other in directory.iterdir():
        if other.is_dir() and other != path:
            shutil.rmtree(other)


PEERS = (
    Peer("stager", True, _stager),
    Peer("torch.save + fsync", True, _torch_save),
    Peer("dcp.async_save", True, _dcp_async_save),
)


def quiet() -> None:
    """Stock torch warns when there is no process group; that is how it is used here on purpose."""
    warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")
