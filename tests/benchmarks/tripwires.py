"""``python -m tests.benchmarks.tripwires``: what the tripwires of guarded saves cost, and what ``staging.verify`` would.

Saves with and without tripwires alternate in one Checkpointer, so that a slow moment of the machine meets both. Reported are
medians of the time in ``save()``, and the median of what each pair differs by.

With ``--loop``: a training loop of one thread, with a guarded save every few steps, with and without ``staging.verify``.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from stager import Checkpointer
from stager.snapshot.taker import SnapshotTaker

_STATES = {"1.5 GiB": (96, 4 << 20), "20,000 x 1 KiB": (20_000, 256)}
_STEPS = 10


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.tripwires", description=__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="pairs of saves")
    parser.add_argument("--state", choices=_STATES, action="append", help="only this one")
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of tensors")
    parser.add_argument("--loop", action="store_true", help="measure staging.verify in a training loop")
    options = parser.parse_args(arguments)
    for name in options.state or _STATES:
        count, numel = _STATES[name]
        parameters = [torch.nn.Parameter(torch.ones(numel)) for _ in range(max(1, int(count * options.scale)))]
        optimizer = torch.optim.SGD(parameters, lr=0.0)
        state = {f"layer{number}.weight": p for number, p in enumerate(parameters)}
        print(f"{name}: {(_verify if options.loop else _tripwires)(options.rounds, state, optimizer)}", flush=True)


def _tripwires(rounds: int, state: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> str:
    arm = SnapshotTaker.arm
    secs: dict[bool, list[float]] = {True: [], False: []}
    arming: list[float] = []

    def timed_arm(*arguments: object) -> None:
        started = time.perf_counter()
        arm(*arguments)  # type: ignore[arg-type]  # the method's own arguments, passed on
        arming.append(time.perf_counter() - started)

    with tempfile.TemporaryDirectory() as directory, Checkpointer(Path(directory) / "run") as ckpt:
        ckpt.guard(optimizer)
        ckpt.warmup({"model": state})
        try:
            for number in range(2 * (rounds + 1)):
                is_armed = (number + number // 2) % 2 == 0  # the first of a pair takes turns, too
                SnapshotTaker.arm = timed_arm if is_armed else lambda *_: None  # type: ignore[method-assign,assignment]  # measured in turn
                started = time.perf_counter()
                handle = ckpt.save(1, {"model": state})
                secs[is_armed].append(time.perf_counter() - started)
                handle.upload_completion.result()
        finally:
            SnapshotTaker.arm = arm  # type: ignore[method-assign]  # measured in turn
    with_wires, without = secs[True][1:], secs[False][1:]
    difference = statistics.median(a - b for a, b in zip(with_wires, without, strict=True))
    before = statistics.median(without)
    return (
        f"save() {before * 1e3:.2f} ms without, {statistics.median(with_wires) * 1e3:.2f} ms with; median difference "
        f"{difference * 1e3:+.2f} ms ({difference / before:+.1%}); arming alone {statistics.median(arming[1:]) * 1e3:.2f} ms"
    )


def _verify(rounds: int, state: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> str:
    torch.set_num_threads(1)
    secs: dict[str, list[float]] = {"no save": [], "saves": [], "saves, verified": []}
    with tempfile.TemporaryDirectory() as directory:
        plain = Checkpointer(Path(directory) / "plain")
        verified = Checkpointer(Path(directory) / "verified", {"staging": {"verify": True}})
        with plain, verified:
            for ckpt in (plain, verified):
                ckpt.guard(optimizer)
                ckpt.warmup({"model": state})
            for _ in range(rounds + 1):
                for name, one in zip(secs, (None, plain, verified), strict=True):
                    secs[name].append(_loop(one, state, optimizer))
    medians = {name: statistics.median(some[1:]) for name, some in secs.items()}
    return ", ".join(f"{name} {value:.3f} s" for name, value in medians.items())


def _loop(ckpt: Checkpointer | None, state: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> float:
    """Return the seconds of some steps, with a save before the first."""
    x = torch.ones(512, 512)
    started = time.perf_counter()
    handle = ckpt.save(1, {"model": state}) if ckpt is not None else None
    for _ in range(_STEPS):
        for _ in range(20):
            x = torch.mm(x, x).clamp(-1, 1)
        optimizer.step()
    ended = time.perf_counter()
    if handle is not None:
        handle.upload_completion.result()
    return ended - started


if __name__ == "__main__":
    main()
