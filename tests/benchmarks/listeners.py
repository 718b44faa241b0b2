"""``python -m tests.benchmarks.listeners``: what those who watch saves cost them.

Saves alternate in one Checkpointer, so that a slow moment of the machine meets all ways of watching: nothing at all (the
profiler's ranges taken out), the ranges alone, a listener, OpenTelemetry, and all of them. Reported are medians of the
time in ``save()``, of the processor time of the calling thread there, of the time until the commit, and of the processor
time of the process until every event is delivered; and of what each differs by from the save with nothing in the same
round, with half of the distance between the quartiles.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from torch.profiler import record_function

from stager import Checkpointer, CommittedEvent, Event, OpenTelemetryMetrics

_STATES = {"256 MiB": (1, 64 << 20), "20,000 x 1 KiB": (20_000, 256)}
_FIGURES = ("in save()", "processor of its thread in save()", "until the commit", "processor of the process")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.listeners", description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--state", choices=_STATES, action="append", help="only this one")
    parser.add_argument("--scale", type=float, default=1.0, help="of the size of the state")
    options = parser.parse_args(arguments)
    print(f"an empty range without a profiler: {_range_secs() * 1e6:.2f} us")
    for name in options.state or _STATES:
        count, numel = _STATES[name]
        count, numel = max(1, int(count * options.scale)), numel if count > 1 else max(1, int(numel * options.scale))
        _measure(name, {f"layer{number}.weight": torch.ones(numel) for number in range(count)}, options.rounds)


def _range_secs(repeats: int = 10_000) -> float:
    started = time.perf_counter()
    for _ in range(repeats):
        with record_function("range"):
            pass
    return (time.perf_counter() - started) / repeats


def _measure(name: str, state: dict[str, torch.Tensor], rounds: int) -> None:
    provider = MeterProvider([InMemoryMetricReader()], shutdown_on_exit=False)
    otel = OpenTelemetryMetrics(provider)
    got: list[object] = []
    ways: dict[str, tuple[bool, list[Callable[[Any], object]]]] = {
        "nothing": (False, []),
        "ranges": (True, []),
        "a listener": (True, [got.append]),
        "OpenTelemetry": (True, [otel]),
        "all": (True, [got.append, otel]),
    }
    found: dict[str, list[tuple[float, ...]]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as directory, Checkpointer(Path(directory) / "run") as ckpt:
        ckpt.warmup(state)
        for number in range(rounds + 1):
            for way in random.Random(number).sample(list(ways), len(ways)):  # none always follows the same other one
                has_ranges, listeners = ways[way]
                with _watched(ckpt, has_ranges, listeners) as delivered:
                    found[way].append(_save(ckpt, state, delivered))
    provider.shutdown()
    for column, figure in enumerate(_FIGURES):
        plain = [one[column] for one in found["nothing"][1:]]
        print(f"{name}, {figure}: {statistics.median(plain) * 1e3:.2f} ms with nothing")
        for way in list(ways)[1:]:
            differences = [a[column] - b for a, b in zip(found[way][1:], plain, strict=True)]
            low, median, high = statistics.quantiles(differences, n=4) if rounds > 1 else differences * 3
            spread = (high - low) / 2
            print(f"    {way:<14} {median * 1e3:+8.3f} ms (+-{spread * 1e3:.3f})", flush=True)


@contextmanager
def _watched(
    ckpt: Checkpointer, has_ranges: bool, listeners: Sequence[Callable[[Any], object]]
) -> Iterator[list[threading.Event]]:
    """Yields what is set when the listeners have got the last event of a save."""

    def told(listener: Callable[[Any], object], end: threading.Event) -> Callable[[Any], None]:
        def call(event: Event) -> None:
            listener(event)
            if isinstance(event, CommittedEvent):
                end.set()

        return call

    ends = [threading.Event() for _ in listeners]
    stops = [ckpt.listen(told(listener, end)) for listener, end in zip(listeners, ends, strict=True)]
    none = mock.patch("stager.checkpointer.record_function", lambda name: nullcontext())
    with nullcontext() if has_ranges else none:
        yield ends
    for stop in stops:
        stop()


def _save(
    ckpt: Checkpointer, state: dict[str, torch.Tensor], delivered: Sequence[threading.Event]
) -> tuple[float, ...]:
    processor, started = time.process_time(), time.perf_counter()
    own = time.thread_time()
    handle = ckpt.save(1, {"model": state})
    own, returned = time.thread_time() - own, time.perf_counter()
    handle.upload_completion.result()
    committed = time.perf_counter()
    for event in delivered:
        event.wait()
    return returned - started, own, committed - started, time.process_time() - processor


if __name__ == "__main__":
    main()
