"""A rank for ``test_job.py``: says who it is and one step, meets the others, then does as its arguments say.

It writes the lines itself: importing ``stager.demo`` takes seconds, for torch.
"""

from __future__ import annotations

import json
import os
import signal
import sys


def main(order: str, *arguments: str) -> None:
    """``arguments`` end with ``--events FIFO``."""
    rank = int(os.environ["RANK"])
    with open(arguments[-1], "wb", buffering=0) as fifo:
        said = {"rank": rank, "kind": "said"}
        for line in (
            {"rank": rank, "kind": "started", "pid": os.getpid()},
            said | {"event": {"kind": "step", "step": 1, "loss": 0.5, "time": 0.0}},
        ):
            fifo.write(json.dumps(line).encode() + b"\n")
        if order == "exit":
            print(f"this is the last line of rank {rank}", file=sys.stderr)
            sys.exit(int(arguments[rank]))
        signal.pause()


if __name__ == "__main__":
    main(*sys.argv[1:])
