"""torch.distributed.checkpoint: ``save``, and ``async_save`` from a thread and from a process."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

from tests.benchmarks.peers.contracts import Done, Peer, Session, path_of
from tests.benchmarks.workload import Workload


class _Pending:
    """``async_save`` returns a Future, or two when the stager copies in the background."""

    def __init__(self, response: Any) -> None:
        self._staged: Future[None] | None = getattr(response, "staging_completion", None)
        self._stored: Future[Any] = getattr(response, "upload_completion", response)

    def wait_staged(self) -> None:
        if self._staged is not None:
            self._staged.result()

    def stored(self) -> bool:
        return self._stored.done()

    def wait_stored(self) -> None:
        self._stored.result()


class _DcpSession(Session):
    def __init__(self, workload: Workload, directory: Path) -> None:
        self._workload = workload
        self._directory = directory
        import torch.distributed as dist

        # The process variant refuses to run without a process group; the others get the same.
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    def load(self, step: int) -> None:
        import torch.distributed.checkpoint as dcp

        state = self._workload.collect()
        dcp.load(state, checkpoint_id=path_of(self._directory, step))
        for name, target in self._workload.objects.items():
            if not isinstance(target, dict):
                target.load_state_dict(state[name])

    def close(self) -> None:
        import torch.distributed as dist

        dist.destroy_process_group()


class SaveSession(_DcpSession):
    def save(self, step: int) -> Done:
        import torch.distributed.checkpoint as dcp

        dcp.save(self._workload.collect(), checkpoint_id=path_of(self._directory, step))
        return Done()


class AsyncSession(_DcpSession):
    """``process``: another process writes. ``shared``: staged in a thread, into shared memory that is kept."""

    def __init__(self, workload: Workload, directory: Path, *, process: bool = False, shared: bool = False) -> None:
        super().__init__(workload, directory)
        from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

        self._type = AsyncCheckpointerType.PROCESS if process else AsyncCheckpointerType.THREAD
        self._stager = _shared_memory_stager() if shared else None
        self._last: _Pending | None = None

    def save(self, step: int) -> _Pending:
        import torch.distributed.checkpoint as dcp

        response = dcp.async_save(
            self._workload.collect(),
            checkpoint_id=path_of(self._directory, step),
            async_checkpointer_type=self._type,
            async_stager=self._stager,
        )
        self._last = _Pending(response)
        return self._last

    def around_step(self) -> Any:
        return _AfterStaging(self._last)

    def close(self) -> None:
        if self._stager is not None:
            self._stager.close()
        super().close()


class _AfterStaging:
    def __init__(self, pending: _Pending | None) -> None:
        self._pending = pending

    def __enter__(self) -> None:
        if self._pending is not None:
            self._pending.wait_staged()

    def __exit__(self, *_: object) -> None:
        pass


def _shared_memory_stager() -> Any:
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

    return DefaultStager(
        StagingOptions(
            use_pinned_memory=False, use_shared_memory=True, use_async_staging=True, use_non_blocking_copy=False
        )
    )


class StagingSession(Session):
    """The copy alone, as torch's DefaultStager does it by default: pinned and shared memory, a thread, a side stream."""

    def __init__(self, workload: Workload, directory: Path) -> None:
        from torch.distributed.checkpoint.staging import DefaultStager

        self._workload = workload
        self._stager = DefaultStager()

    def save(self, step: int) -> _Staged:
        return _Staged(self._stager.stage(self._workload.collect()))

    def close(self) -> None:
        self._stager.close()


class _Staged:
    """Staged is all there is."""

    def __init__(self, staged: Any) -> None:
        self._staged = staged

    def wait_staged(self) -> None:
        self._staged.result()

    def stored(self) -> bool:
        return bool(self._staged.done())

    def wait_stored(self) -> None:
        self._staged.result()


PEERS = (
    Peer("dcp-save", "dcp.save", "blocks; syncs its files", True, SaveSession, blocking=True),
    Peer("dcp-thread", "dcp.async_save, thread", "syncs its files", True, AsyncSession),
    Peer(
        "dcp-process",
        "dcp.async_save, process",
        "stock staging; syncs its files",
        True,
        lambda w, d: AsyncSession(w, d, process=True),
    ),
    Peer(
        "dcp-process-shared",
        "dcp.async_save, process, shared memory",
        "DefaultStager into kept shared memory, in a thread; syncs its files",
        True,
        lambda w, d: AsyncSession(w, d, process=True, shared=True),
    ),
    Peer("torch-stager", "torch's DefaultStager", "stages only, stores nothing; on a GPU", False, StagingSession),
)
