"""A rank for ``test_job.py``: says who it is and two steps, then does as its arguments say.

It writes the lines itself: importing ``stager.demo`` takes seconds, for torch.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys


def main(order: str, *arguments: str) -> None:
    """``arguments`` end with ``--events FIFO``."""
    rank = int(os.environ.get("RANK", "0"))
    with open(arguments[-1], "wb", buffering=0) as fifo:

        def send(**event: object) -> None:
            fifo.write(json.dumps({"rank": rank, "event": event}).encode() + b"\n")

        send(kind="started", pid=os.getpid())
        send(kind="step", step=1, loss=0.5, time=0.0)
        send(kind="step", step=2, loss=0.25, time=0.0)
        if order == "exit":
            print(f"this is the last line of rank {rank}", file=sys.stderr)
            sys.exit(int(arguments[rank]))
        if order == "leave a worker":
            command = [sys.executable, "-c", "import signal; print('up', flush=True); signal.pause()"]
            worker = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
            assert worker.stdout is not None
            worker.stdout.readline()  # while a process is being exec'ed, its environment reads as empty
            send(kind="resumed", step=worker.pid)
        signal.pause()


if __name__ == "__main__":
    main(*sys.argv[1:])
