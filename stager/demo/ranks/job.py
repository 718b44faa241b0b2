"""A job of several ranks: started by a torchrun of its own, listened to, and killed, all of it or one rank."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import psutil

from stager.demo.child import Child, child_environment
from stager.demo.ranks.events import RankEvent, RankStarted, decode_line

# What torchrun tells its ranks. The demo is one of them, and its own torchruns are not to take it for theirs.
LAUNCHER_VARIABLES = frozenset(
    (
        "RANK",
        "LOCAL_RANK",
        "GROUP_RANK",
        "ROLE_RANK",
        "ROLE_NAME",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "GROUP_WORLD_SIZE",
        "ROLE_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING",
    )
)
LAUNCHER_PREFIXES = ("TORCHELASTIC_", "PET_")


class Job(Child):
    """``torchrun --nproc-per-node N -m MODULE ARGUMENTS --events FIFO``, on a free port of this host.

    Used as a context manager: on the way out every rank is dead, and so is their torchrun.  Workers are the ranks' own
    to stop; :meth:`workers_alive` finds them.
    """

    def __init__(self, num_ranks: int, module: str, arguments: Sequence[str], log: Path) -> None:
        self._num_ranks = num_ranks
        self._ranks: dict[int, psutil.Process] = {}
        self._directory = tempfile.mkdtemp(prefix="stager-demo-")
        try:
            fifo = os.path.join(self._directory, "events")
            os.mkfifo(fifo)
            read_fd = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)  # no rank has it open yet
            write_fd = os.open(fifo, os.O_WRONLY)  # for torchrun, which does not pass it on
            launcher = ["torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nnodes", "1"]
            command = [sys.executable, "-m", *launcher, "--nproc-per-node", str(num_ranks)]
            command += ["--log-dir", os.devnull]  # else it makes a temporary directory that nothing removes, nor needs
            command += ["-m", module, *arguments, "--events", fifo]
            self._start(command, job_environment(os.environ), read_fd, write_fd, log)
        except BaseException:
            shutil.rmtree(self._directory)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, traceback)
        shutil.rmtree(self._directory, ignore_errors=True)

    def rank_events(self) -> Iterator[RankEvent]:
        """What the ranks say, until the end of the whole job.

        Raises:
            ChildError: they said nothing for ``SILENCE_SECS``.
        """
        for text in self.lines():
            line = decode_line(text)
            if isinstance(line, RankEvent):
                yield line
            else:
                self._note(line)

    def _note(self, started: RankStarted) -> None:
        with suppress(psutil.NoSuchProcess):  # it has not lived long
            self._ranks[started.rank] = psutil.Process(started.pid)
        if len(self._ranks) == self._num_ranks:  # all have it open; if the demo is killed now, no file is left of it
            shutil.rmtree(self._directory, ignore_errors=True)

    def kill(self) -> None:
        """SIGKILL every rank and their torchrun, as a node that goes down would.  Not the workers, and nothing if the
        job has ended already."""
        if self._process.poll() is not None:
            return
        self._process.send_signal(signal.SIGSTOP)  # so that it starts nothing more
        for process in self._ranks.values():
            _kill(process)
        with suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self._process.pid).children():  # ranks that have not said a word yet
                _kill(process)
        super().kill()

    def kill_rank(self, rank: int) -> None:
        """SIGKILL one rank; what becomes of the job is torchrun's business."""
        _kill(self._ranks[rank])

    def _trainers(self) -> set[int]:
        return {self._process.pid, *(process.pid for process in self._ranks.values())}


def _kill(process: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):
        process.kill()


def job_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """For a job that is started by a rank of another job: what is of that one is left out."""
    variables = child_environment(environment)
    return {
        name: value
        for name, value in variables.items()
        if name not in LAUNCHER_VARIABLES and not name.startswith(LAUNCHER_PREFIXES)
    }
