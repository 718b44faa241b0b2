"""Stands in for :mod:`subprocess` in a module that starts ``python -m MODULE``: the fork server has imported torch already.

    monkeypatch.setattr(launch, "subprocess", forked_subprocess)

Everything but ``python -m`` is started afresh. A test about how an interpreter starts does not use this.

A launcher starts ranks, and a rank of the demo starts launchers. With :data:`LAUNCHES` in its environment, a process that
was started here starts ``python -m`` in this way, too.
"""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT, CompletedProcess, TimeoutExpired
from typing import IO, Any

from tests import fork_server

__all__ = ["DEVNULL", "PIPE", "STDOUT", "Popen", "TimeoutExpired", "run"]

LAUNCHES = "STAGER_TEST_LAUNCHES"
_OF_LAUNCHERS = ("torch.distributed.launcher.api", "stager.demo.run", "stager.demo.chart")


class ForkedProcess:
    """A process of the fork server, with what :class:`subprocess.Popen` has of attributes and methods.

    Args:
        arguments: of python, from ``-m`` on.
        stdout, stderr: files that are open here; the process opens them again by their names.
        held: pipes that the process holds open for as long as it lives.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        environment: dict[str, str] | None,
        stdout: Path,
        stderr: Path,
        held: Sequence[Path] = (),
        cwd: str | os.PathLike[str] | None = None,
    ) -> None:
        self._server = fork_server.shared()
        self.returncode: int | None = None
        self.pid = self._server.start(
            f"{__name__}:run_module",
            [list(map(str, arguments)), os.fspath(cwd or Path.cwd())],
            stdout=stdout,
            stderr=stderr,
            environment=environment,
            modules=_OF_LAUNCHERS if LAUNCHES in (environment or os.environ) else (),
            held=held,
        )

    def poll(self) -> int | None:
        try:
            return self.wait(0.0)
        except TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            try:
                self.returncode = self._server.wait(self.pid, timeout)
            except TimeoutError:
                raise TimeoutExpired(str(self.pid), timeout or 0.0) from None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def Popen(arguments: Sequence[str] = (), **options: Any) -> Any:  # the name that it stands in for
    """As :class:`subprocess.Popen`, for output that goes to files."""
    given = options.pop("args", arguments)
    words = [word for number, word in enumerate(given) if (number, word) != (1, "-u")]
    if words[:2] != [sys.executable, "-m"]:
        return subprocess.Popen(given, **options)
    stdout, stderr = options.get("stdout"), options.get("stderr")
    return ForkedProcess(
        words[1:],
        options.get("env"),
        _path_of(1 if stdout is None else stdout),
        _path_of(2 if stderr is None else stdout if stderr == STDOUT else stderr),
        [_path_of(fd) for fd in options.get("pass_fds", ())],
        options.get("cwd"),
    )


def run(
    arguments: Sequence[str],
    *,
    check: bool = False,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
    **_: Any,
) -> CompletedProcess[str]:
    """As :func:`subprocess.run` with text captured: all that is printed, in files until the process has ended."""
    with tempfile.TemporaryDirectory() as directory:
        stdout, stderr = Path(directory, "stdout"), Path(directory, "stderr")
        code = ForkedProcess(arguments[1:], env, stdout, stderr, cwd=cwd).wait()
        done = CompletedProcess(arguments, code, stdout.read_text(), stderr.read_text())
    if check and code:
        print(done.stderr, file=sys.stderr)
        done.check_returncode()
    return done


def _path_of(file: IO[Any] | int) -> Path:
    fd = file if isinstance(file, int) else file.fileno()
    return Path(os.readlink(f"/proc/self/fd/{fd}"))


def run_module(arguments: list[str], directory: str) -> None:
    """In the process: what ``python -m`` does."""
    if LAUNCHES in os.environ:
        fork_server.nest()  # no thread has been started yet
        _stand_in()
    os.chdir(directory)
    _, module, *sys.argv[1:] = arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _stand_in() -> None:
    """For what torchrun and the demo start processes with."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    from stager.demo import job

    vars(subprocess_handler)["Popen"] = Popen
    vars(job)["subprocess"] = sys.modules[__name__]
