"""``python -m tests.benchmarks.python_values``: states of Python values, beside ``torch.save`` and ``torch.load``.

Each round times, in turn and in an order of its own:

    save   stager: until ``save()`` has returned (then the checkpoint is waited for); ``torch.save``: to a file, not synced
    load   stager: ``Checkpointer.load()`` with every hash checked; ``torch.load(weights_only=False)``, which runs any
           pickle, is the one to compare with; ``torch.load()`` by its default rules stands beside it

The figures are medians over the rounds; the ratios are medians of the ratios within a round. Size is that of all files.
Memory is the peak of the trainer's resident memory, less that before, in units of the value's own size.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stager import Checkpointer, CheckpointInfo

State = dict[str, Any]


def _log_history(scale: float) -> State:
    count = max(1, int(10_000 * scale))
    return {
        "log_history": [
            {"loss": 2.5 / (i + 1), "grad_norm": 0.1 * i, "learning_rate": 5e-5, "epoch": i / 100, "step": i}
            for i in range(count)
        ]
    }


def _ints(scale: float) -> State:
    return {"seen": list(range(max(1, int(1_000_000 * scale))))}


def _set(scale: float) -> State:
    return {"seen": set(range(max(1, int(1_000_000 * scale))))}


def _nest(scale: float) -> State:
    value: Any = 0
    for level in range(max(1, int(200 * min(1.0, scale * 10)))):  # torch.save takes 246
        value = {"level": level, "below": [value]}
    return {"nest": value}


def _nests(scale: float) -> State:
    return {"nests": [_nest(scale)["nest"] for _ in range(max(1, int(100 * scale)))]}


def _floats(scale: float) -> State:
    return {"scores": {f"sample-{i:06}": i / 7 for i in range(max(1, int(100_000 * scale)))}}


def _array(scale: float) -> State:
    return {"replay": np.random.default_rng(0).integers(0, 256, max(1, int((256 << 20) * scale)), np.uint8)}


def _tiny(scale: float) -> State:
    return {"step": 100, "lr": 1e-4, "name": "run"}


CASES: dict[str, Callable[[float], State]] = {
    "log_history of 10,000 dicts": _log_history,
    "list of 1,000,000 ints": _ints,
    "set of 1,000,000 ints": _set,
    "200 dicts and lists in each other": _nest,
    "100 times 200 dicts and lists in each other": _nests,
    "dict of 100,000 str to float": _floats,
    "numpy array of 256 MiB": _array,
    "three small values": _tiny,
}


class _Contest:
    """stager and torch on one state, in one directory."""

    def __init__(self, state: State, directory: Path, checkpointer: Checkpointer) -> None:
        self._state = state
        self._directory = directory
        self._checkpointer = checkpointer
        self._file = directory / "state.pt"
        self.info: CheckpointInfo | None = None

    def save(self) -> Callable[[], object]:
        handle = self._checkpointer.save(1, self._state)

        def wait() -> None:
            self.info = handle.upload_completion.result()

        return wait

    def torch_save(self) -> None:
        torch.save(self._state, self._file)

    def load(self) -> object:
        loaded = self._checkpointer.load(1)
        assert loaded is not None
        return loaded.state

    def torch_load(self) -> object:
        return torch.load(self._file, weights_only=False)

    def torch_load_safely(self) -> object:
        with torch.serialization.safe_globals([*_NUMPY, set]):
            return torch.load(self._file, weights_only=True)

    @property
    def nbytes(self) -> int:
        assert self.info is not None
        return sum(path.stat().st_size for path in Path(self.info.path).iterdir())

    @property
    def torch_nbytes(self) -> int:
        return self._file.stat().st_size


_NUMPY: list[Any] = [np.ndarray, np.dtype, np.dtypes.UInt8DType, np.zeros(1).__reduce__()[0]]


def measure(name: str, scale: float, rounds: int, directory: Path) -> dict[str, Any]:
    state = CASES[name](scale)
    with Checkpointer(directory / "run") as checkpointer:
        checkpointer.warmup(state)
        contest = _Contest(state, directory, checkpointer)
        actions: dict[str, Callable[[], Any]] = {
            "save": contest.save,
            "torch.save": contest.torch_save,
            "load": contest.load,
            "torch.load": contest.torch_load,
            "torch.load, default": contest.torch_load_safely,
        }
        secs: dict[str, list[float]] = {one: [] for one in actions}
        memory: dict[str, int] = {}
        for number in range(rounds + 1):
            for one in _in_turn(actions, number):
                before = _reset_peak()
                taken, result = _timed(actions[one])
                peak = _peak_bytes() - before
                if one == "save":
                    result()
                elif one != "torch.save":
                    assert _same(result, state), one
                del result
                if number:  # the first round warms up
                    secs[one].append(taken)
                    memory[one] = max(peak, memory.get(one, 0))
        size = contest.nbytes, contest.torch_nbytes
    return {
        "case": name,
        "ms": {one: 1e3 * statistics.median(values) for one, values in secs.items()},
        "range_ms": {one: [1e3 * min(values), 1e3 * max(values)] for one, values in secs.items()},
        "nbytes": {"stager": size[0], "torch.save": size[1]},
        "peak_bytes": memory,
        "stall / torch.save": _ratio(secs["save"], secs["torch.save"]),
        "size / torch.save": size[0] / size[1],
        "load / torch.load": _ratio(secs["load"], secs["torch.load"]),
        "load / torch.load, default": _ratio(secs["load"], secs["torch.load, default"]),
    }


def _in_turn(actions: dict[str, Any], number: int) -> list[str]:
    """Saves first, in turns; then loads, in turns."""
    saves, loads = ["save", "torch.save"], [name for name in actions if "load" in name]
    shift = number % len(loads)
    return [*(saves if number % 2 else saves[::-1]), *loads[shift:], *loads[:shift]]


def _timed(action: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = action()
    return time.perf_counter() - started, result


def _same(loaded: Any, saved: State) -> bool:
    return all(np.array_equal(loaded[key], value) if isinstance(value, np.ndarray) else loaded[key] == value
               for key, value in saved.items())  # fmt: skip


def _ratio(first: list[float], second: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(first, second, strict=True))


def _reset_peak() -> int:
    """Let the kernel count the peak of this process anew. Returns the resident bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak_bytes() -> int:
    return _status("VmHWM")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=list(CASES))
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="write a JSON file")
    options = parser.parse_args(arguments)
    results = []
    for case in options.case or CASES:
        with tempfile.TemporaryDirectory(prefix="stager-python-values-") as directory:
            results.append(measure(case, options.scale, options.rounds, Path(directory)))
        _print(results[-1])
    if options.out is not None:
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    return results


def _print(one: dict[str, Any]) -> None:
    print(one["case"])
    for name, value in one["ms"].items():
        low, high = one["range_ms"][name]
        peak = one["peak_bytes"][name] / 2**20
        print(f"  {name:22} {value:9.2f} ms ({low:.2f} to {high:.2f}), peak memory +{peak:,.0f} MiB")
    for name, nbytes in one["nbytes"].items():
        print(f"  {name:22} {nbytes / 2**20:9.2f} MiB")
    for name in ("stall / torch.save", "size / torch.save", "load / torch.load", "load / torch.load, default"):
        print(f"  {name:28} {one[name]:6.2f}")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
