"""Hostile states by seed: freed, shrunk, faked, wrapped and expanded storages, and objects whose own code is hostile.

    python -m tests.states.mutations --count 20000 --seed 1

None of them may end the process, and none may raise anything but UnstageableError with a key path. What was saved can be
loaded; only where torch.load cannot load what torch.save makes of it, it is UnloadableError. Many states share a child; when
one ends its child by a signal, the next child goes on behind it. The last lines count the outcomes.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator

import torch

from stager import Checkpointer, UnloadableError, UnstageableError
from tests.states.hostile import hostile_state

_TIMEOUT_SECS = 150
_STATES_PER_CHILD = 200


def outcome(checkpointer: Checkpointer, seed: int) -> str:
    """Save and load the state of a seed: "kept", "refused", "unloadable, as with torch", or what went wrong."""
    state, _ = hostile_state(seed)
    try:
        checkpointer.save(1, state).upload_completion.result()
    except UnstageableError as error:
        return "refused" if error.key_path else "refused without a key path"
    except Exception as error:  # noqa: BLE001  # any other error is what is looked for
        return f"save raised {type(error).__name__}: {error!s:.120}"
    try:
        loaded = checkpointer.load(allow_pickle=True)
    except UnloadableError as error:
        return f"load raised UnloadableError: {error!s:.160}" if _torch_loads(seed) else "unloadable, as with torch"
    except Exception as error:  # noqa: BLE001  # whatever is raised is what is looked for
        return f"load raised {type(error).__name__}: {error!s:.160}"
    return "kept" if loaded is not None and loaded.step == 1 else "load took another checkpoint"


def _torch_loads(seed: int) -> bool:
    """Whether torch.load can load what torch.save makes of the state of this seed."""
    state, _ = hostile_state(seed)
    file = io.BytesIO()
    try:
        torch.save(state, file)
        file.seek(0)
        torch.load(file, weights_only=False)
    except Exception:  # noqa: BLE001  # whatever their code raises
        return False
    return True


def run(seeds: range, file_format: str) -> Iterator[tuple[int, str]]:
    """Yield (seed, outcome) of every seed; an outcome "ended by SIGSEGV" is that of a child."""
    rest = seeds
    while rest:
        some, last = rest[:_STATES_PER_CHILD], rest[0]
        reader, writer = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(reader)
            _child(some, file_format, writer)
        os.close(writer)
        told = None
        with os.fdopen(reader) as lines:
            for line in lines:
                last, told = json.loads(line)
                if told is not None:
                    yield last, told
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code:
            yield last, f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            some = rest[: last - rest[0] + 1]
        rest = rest[len(some) :]


def _child(seeds: range, file_format: str, writer: int) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    settings = {
        "persistence": {"format": file_format, "fsync": False},
        "workers": {"count": 1},
        "arena": {"prefault": False},
    }
    try:
        with tempfile.TemporaryDirectory() as directory, os.fdopen(writer, "w") as out, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Checkpointer(directory, settings) as checkpointer:
                checkpointer.save(0, {"x": 0}).upload_completion.result()
                for seed in seeds:
                    signal.alarm(_TIMEOUT_SECS)
                    print(json.dumps([seed, None]), file=out, flush=True)
                    print(json.dumps([seed, outcome(checkpointer, seed)]), file=out, flush=True)
                signal.alarm(0)
        os._exit(0)
    finally:
        os._exit(3)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1, help="of the first state; the others follow")
    parser.add_argument("--format", default="dcp", choices=["dcp", "torch", "safetensors"])
    options = parser.parse_args()
    torch.set_num_threads(1)  # a child cannot use the threads that its parent has made
    counts: Counter[str] = Counter()
    bad = 0
    for seed, what in run(range(options.seed, options.seed + options.count), options.format):
        counts[what.split(":")[0]] += 1
        if what not in ("kept", "refused", "unloadable, as with torch"):
            bad += 1
            print(f"seed {seed}: {what} ({', '.join(hostile_state(seed)[1])})", flush=True)
    for what, count in counts.most_common():
        print(f"{count:6d} {what}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
