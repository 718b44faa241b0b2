"""A child for ``test_child.py``: sends two steps and ends as its arguments say.

It writes the lines itself: importing ``stager.demo`` takes seconds, for torch.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys


def send(fd: int, **event: object) -> None:
    """One line of the pipe."""
    os.write(fd, json.dumps(event).encode() + b"\n")


def main(order: str, *arguments: str) -> None:
    """``arguments`` end with ``--events-fd FD``."""
    fd = int(arguments[-1])
    send(fd, kind="step", step=1, loss=0.5, time=0.0)
    send(fd, kind="step", step=2, loss=0.25, time=0.0)
    if order == "exit":
        print("this is the last line", file=sys.stderr)
        sys.exit(int(arguments[0]))
    if order == "leave a worker":
        command = [sys.executable, "-c", "import signal; print('up', flush=True); signal.pause()"]
        worker = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        assert worker.stdout is not None
        worker.stdout.readline()  # while a process is being exec'ed, its environment reads as empty
        send(fd, kind="resumed", step=worker.pid)
    signal.pause()


if __name__ == "__main__":
    main(*sys.argv[1:])
