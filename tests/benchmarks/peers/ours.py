"""stager, as its users find it, and with what they may switch on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.benchmarks.peers.contracts import Peer, Session
from tests.benchmarks.workload import Workload

if TYPE_CHECKING:
    from stager import Checkpointer, SaveHandle


class _Pending:
    def __init__(self, handle: SaveHandle) -> None:
        self._handle = handle

    def wait_staged(self) -> None:
        self._handle.staging_completion.result()

    def stored(self) -> bool:
        return self._handle.upload_completion.done()

    def wait_stored(self) -> None:
        self._handle.upload_completion.result()


class _AfterStaging:
    """The wait that the guard's hook would do inside ``optimizer.step()``, a moment before it, so that it can be timed."""

    def __init__(self, ckpt: Checkpointer) -> None:
        self._ckpt = ckpt

    def __enter__(self) -> None:
        self._ckpt.wait_for_staging()

    def __exit__(self, *_: object) -> None:
        pass


class StagerSession(Session):
    def __init__(
        self,
        workload: Workload,
        directory: Path,
        *,
        warm: bool = True,
        guarded: bool = False,
        config: dict[str, Any] | None = None,
    ) -> None:
        from stager import Checkpointer

        self._workload = workload
        self._warm = warm
        self._ckpt = Checkpointer(directory, config)
        if guarded:
            self._ckpt.guard(*workload.optimizers)

    def warm_up(self) -> bool:
        if self._warm:
            self._ckpt.warmup(self._workload.objects)
        return self._warm

    def save(self, step: int) -> _Pending:
        return _Pending(self._ckpt.save(step, self._workload.objects))

    def around_step(self) -> _AfterStaging:
        return _AfterStaging(self._ckpt)

    def load(self, step: int) -> None:
        self._ckpt.load(step, into=self._workload.objects)

    def close(self) -> None:
        self._ckpt.close()


_WORKERS: dict[str, Any] = {"staging": {"location": "workers"}}

PEERS = (
    Peer("stager", "stager", "after warmup()", True, StagerSession, ours=True),
    Peer("stager-cold", "stager, no warmup", "", True, lambda w, d: StagerSession(w, d, warm=False), ours=True),
    Peer(
        "stager-guarded",
        "stager, guarded",
        "after warmup(); overlaps the copy of what the optimizers hold",
        True,
        lambda w, d: StagerSession(w, d, guarded=True),
        ours=True,
    ),
    Peer(
        "stager-workers",
        "stager, location: workers",
        "after warmup(); the workers copy",
        True,
        lambda w, d: StagerSession(w, d, config=_WORKERS),
        ours=True,
    ),
    Peer(
        "stager-guarded-workers",
        "stager, guarded, location: workers",
        "after warmup(); the workers copy, overlapped",
        True,
        lambda w, d: StagerSession(w, d, guarded=True, config=_WORKERS),
        ours=True,
    ),
)
