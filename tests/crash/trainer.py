"""A trainer to be killed: saves as fast as it can, and says on stdout how far each save is.

    python -m tests.crash.trainer DIRECTORY NBYTES

Lines: ``up``, then ``saved N`` / ``staged N`` / ``committed N``.
"""

from __future__ import annotations

import sys

import torch

from stager import Checkpointer


def value_of(step: int, name: str) -> int:
    """What every element of a tensor is at a step: lets a reader tell whose values it sees."""
    return step * 1000 + sum(map(ord, name)) % 1000


def main(directory: str, nbytes: int) -> None:
    names = ["a", "b", "c", "d"]
    state = {name: torch.zeros(nbytes // 8 // len(names), dtype=torch.int64) for name in names}
    with Checkpointer(directory) as ckpt:
        latest = ckpt.latest()
        step = 0 if latest is None else latest.step + 1
        say("up")
        while True:
            for name in names:
                state[name].fill_(value_of(step, name))
            handle = ckpt.save(step, state)
            say(f"saved {step}")
            handle.staging_completion.add_done_callback(lambda _, n=step: say(f"staged {n}"))
            handle.upload_completion.add_done_callback(lambda _, n=step: say(f"committed {n}"))
            step += 1


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
