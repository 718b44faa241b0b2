"""A job of one or several ranks: started, listened to, killed as a whole or in part, and looked for after its death."""

from __future__ import annotations

import os
import re
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
from typing_extensions import Self

import stager
from stager.demo.events import RankEvent, Started, decode_line
from stager.workers.errors import StagerError

SILENCE_SECS = 120.0  # a job that says nothing for so long is stuck, however slow the machine
EXIT_SECS = 60.0
RECHECK_SECS = 0.1
LOG_LINES_SHOWN = 20

_NONCE_VARIABLE = "DEMO_JOB_NONCE"  # inherited by everything that the job starts, and by nothing else

# Without a log directory torchrun makes a temporary one that nothing needs and nothing removes.
LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nnodes", "1"]
LAUNCHER += ["--log-dir", os.devnull]
# What torchrun tells its ranks.  The demo may be one of them; the jobs that it starts must not see it.
LAUNCHER_VARIABLE = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCH_NCCL_ASYNC_ERROR_HANDLING"
    r"|(TORCHELASTIC|PET)_.*"
)


class JobError(StagerError, RuntimeError):
    """A job of the demo failed; the message ends with the last lines of its log."""


class Job:
    """``python -m MODULE ARGUMENTS --events FIFO``, or the same with torchrun for python, with its output in a log file.

    Used as a context manager: on the way out every rank is dead, and torchrun too, killed if need be.  Workers are the
    ranks' own to stop; :meth:`workers_alive` finds them by an environment variable that only they inherit, even when the
    ranks are dead.

    Args:
        log: the file for the output.
        num_ranks: processes that run the module.
        torchrun: whether torchrun starts them, on a free port of this host; otherwise there is one, started directly.
    """

    def __init__(
        self, module: str, arguments: Sequence[str], log: Path, num_ranks: int = 1, torchrun: bool = False
    ) -> None:
        self._log = log
        self._num_ranks = num_ranks
        self._launched = torchrun
        self._nonce = secrets.token_hex(8)
        self._ranks: dict[int, psutil.Process] = {}
        self._directory = tempfile.mkdtemp(prefix="stager-demo-")
        try:
            fifo = os.path.join(self._directory, "events")
            os.mkfifo(fifo)
            self._pipe = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)  # no rank has it open yet
            self._process = self._start(["-m", module, *arguments, "--events", fifo], fifo)
        except BaseException:
            shutil.rmtree(self._directory)
            raise

    def _start(self, arguments: Sequence[str], fifo: str) -> subprocess.Popen[bytes]:
        # The new process holds a write end for as long as it lives and passes it on to nobody, so that end-of-file means
        # its death and that of every rank, also if it dies before a rank has opened the FIFO.
        write_fd = os.open(fifo, os.O_WRONLY)
        launcher = [*LAUNCHER, "--nproc-per-node", str(self._num_ranks)] if self._launched else []
        try:
            with open(self._log, "wb") as output:
                return subprocess.Popen(
                    [sys.executable, *launcher, *arguments],
                    pass_fds=[write_fd],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env={**job_environment(os.environ), _NONCE_VARIABLE: self._nonce},
                )
        except BaseException:
            os.close(self._pipe)
            raise
        finally:
            os.close(write_fd)

    @property
    def pid(self) -> int:
        """The process id of torchrun, or of the only rank."""
        return self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        os.close(self._pipe)
        shutil.rmtree(self._directory, ignore_errors=True)

    def events(self) -> Iterator[RankEvent]:
        """Yield what the ranks say, until the end of the whole job, be it an exit or a kill.

        Raises:
            JobError: they said nothing for ``SILENCE_SECS``.
        """
        pending = b""
        with selectors.DefaultSelector() as selector:
            selector.register(self._pipe, selectors.EVENT_READ)
            while True:
                if not selector.select(SILENCE_SECS):
                    raise JobError(f"a job said nothing for {SILENCE_SECS:.0f} s{self._log_tail()}")
                chunk = os.read(self._pipe, 1 << 16)
                if not chunk:
                    return  # what is pending is a line that a rank's death cut short
                *lines, pending = (pending + chunk).split(b"\n")
                for said in map(decode_line, lines):
                    if isinstance(said.event, Started):
                        self._note(said.rank, said.event.pid)
                    else:
                        yield said

    def _note(self, rank: int, pid: int) -> None:
        with suppress(psutil.NoSuchProcess):  # dead already
            self._ranks[rank] = psutil.Process(pid)
        if (
            len(self._ranks) == self._num_ranks
        ):  # all have the FIFO open: no file is left if the demo is killed from now on
            shutil.rmtree(self._directory, ignore_errors=True)

    def kill(self) -> None:
        """SIGKILL every rank and torchrun, as a node that goes down would, and wait for the launcher's death.

        Workers live on.  Nothing happens if the job has ended already.
        """
        if self._process.poll() is not None:
            return
        self._process.send_signal(signal.SIGSTOP)  # so that it starts nothing more
        ranks = list(self._ranks.values())
        if self._launched:
            with suppress(psutil.NoSuchProcess):
                ranks += psutil.Process(self.pid).children()  # those that have said nothing yet, too
        for process in ranks:
            _kill(process)
        self._process.kill()
        self._process.wait()

    def kill_rank(self, rank: int) -> None:
        """SIGKILL one rank; what becomes of the others is torchrun's business."""
        _kill(self._ranks[rank])

    def wait(self) -> None:
        """Wait for the exit of the job, after its last event.

        Raises:
            JobError: it failed, or did not exit within ``EXIT_SECS``.
        """
        code = self.exit_code()
        if code != 0:
            raise JobError(f"a job failed with exit code {code}{self._log_tail()}")

    def exit_code(self) -> int:
        """Wait for the exit of a job that may have failed; negative: the signal that killed it.

        Raises:
            JobError: it did not exit within ``EXIT_SECS``.
        """
        try:
            return self._process.wait(EXIT_SECS)
        except subprocess.TimeoutExpired:
            raise JobError(f"a job did not exit within {EXIT_SECS:.0f} s{self._log_tail()}") from None

    def workers_alive(self) -> list[psutil.Process]:
        """Find the processes that are alive of those that the ranks started, directly or not."""
        not_workers = {self.pid, *(process.pid for process in self._ranks.values())}
        return [process for process in psutil.process_iter() if self._is_mine(process, not_workers)]

    def _is_mine(self, process: psutil.Process, not_workers: set[int]) -> bool:
        try:
            mine = process.environ().get(_NONCE_VARIABLE) == self._nonce
            return mine and process.pid not in not_workers and process.status() != psutil.STATUS_ZOMBIE
        except (psutil.Error, OSError):
            return False  # it ended meanwhile, or belongs to another user

    def wait_until_gone(self, timeout_secs: float) -> tuple[float, list[int]]:
        """Wait until no worker of the dead job is alive.

        Returns:
            The seconds it took, and the pids of the workers alive after ``timeout_secs`` (none: all are gone).
        """
        started = time.monotonic()
        deadline = started + timeout_secs
        while (alive := self.workers_alive()) and time.monotonic() < deadline:
            psutil.wait_procs(alive, timeout=RECHECK_SECS)  # no longer: a zombie that nobody reaps has ended too
        return time.monotonic() - started, [process.pid for process in alive]

    def _log_tail(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join([f"; the end of {self._log}:", *lines[-LOG_LINES_SHOWN:]])


def _kill(process: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):
        process.kill()


def child_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment in which a child finds the same ``stager`` as this process, installed or a source tree."""
    variables = dict(environment)
    root = str(Path(stager.__path__[0]).resolve().parent)
    if root not in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, [root, variables.get("PYTHONPATH")]))
    return variables


def job_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a job that a rank of another job starts, without what that rank was told."""
    return {
        name: value for name, value in child_environment(environment).items() if not LAUNCHER_VARIABLE.fullmatch(name)
    }
