"""``python -m tests.benchmarks.worker_stager``: staging by workers, beside stagers of torch and stager that copy themselves.

Each round gives the same state to every stager, in turn and in an order of its own:

    blocked   until ``stage()`` returned
    of it     processor time of the calling thread
    staged    until the state may be changed: the Future's result is there, and is dropped
    loop      (``--loop``) what one staging costs a loop of one thread that multiplies matrices meanwhile: the time of so
              many products with a staging at their beginning, less the time of as many without

The first round, in which memory is allocated, moved and mapped, is reported apart. The other figures are medians; a ratio is
the median of the ratios to torch's ``DefaultStager`` within a round. The processes have one intra-op thread.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint._state_dict_stager import StateDictStager as TorchStateDictStager
from torch.distributed.checkpoint.staging import DefaultStager as TorchDefaultStager
from torch.distributed.checkpoint.staging import StagingOptions as TorchStagingOptions

from stager import StateDictStager, WorkerStager

_BASIS = "torch DefaultStager"
_WIDTH = 128
_STRETCH_SECS = 0.6  # of the loop; longer than a staging takes
_PAIRS = 6  # of stretches with and without a staging, in each round


def _big(scale: float) -> dict[str, Any]:
    return {f"layer{i}.weight": torch.randn(max(1, int((5592405) * scale))) for i in range(72)}


def _small(scale: float) -> dict[str, Any]:
    return {f"layer{i}.weight": torch.randn(256) for i in range(max(1, int(20_000 * scale)))}


def _gpt2(scale: float) -> dict[str, Any]:
    """The tensors of GPT-2 124M, with its tied head, and of AdamW; no transformers needed."""
    width = max(8, int(768 * scale))
    shapes = {"wte.weight": (int(50257 * scale) + 1, width), "wpe.weight": (1024, width), "ln_f": (2, width)}
    for i in range(12):
        for name, rows in (("attn.c_attn", 3), ("attn.c_proj", 1), ("mlp.c_fc", 4), ("mlp.c_proj", 4)):
            shapes |= {f"h.{i}.{name}.weight": (width, rows * width), f"h.{i}.{name}.bias": (1, rows * width)}
        shapes |= {f"h.{i}.ln_{n}.{kind}": (1, width) for n in (1, 2) for kind in ("weight", "bias")}
    model = {name: torch.randn(shape) for name, shape in shapes.items()}
    state = {
        i: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(shape), "exp_avg_sq": torch.zeros(shape)}
        for i, shape in enumerate(shapes.values())
    }
    model["lm_head.weight"] = model["wte.weight"]
    return {
        "model": model,
        "optimizer": {"state": state, "param_groups": [{"lr": 1e-4, "params": [*range(len(state))]}]},
    }


CASES: dict[str, Callable[[float], dict[str, Any]]] = {"big": _big, "small": _small, "gpt2": _gpt2}
STAGERS: dict[str, Callable[[], Any]] = {
    "WorkerStager": WorkerStager,
    "WorkerStager, nice 0": lambda: WorkerStager({"workers": {"nice": 0}}),
    "StateDictStager(share_memory=True)": lambda: StateDictStager(share_memory=True),
    "StateDictStager(share_memory=True, lease=True)": lambda: StateDictStager(share_memory=True, lease=True),
    "torch StateDictStager(share_memory=True)": lambda: TorchStateDictStager(share_memory=True),
    _BASIS: lambda: TorchDefaultStager(TorchStagingOptions(False, False, True, False)),
}
Figures = dict[str, list[float]]


def measure(case: str, scale: float, rounds: int, *, loop: bool) -> dict[str, Any]:
    """Return the figures of every stager for one case."""
    state = CASES[case](scale)
    figures: dict[str, Figures] = {}
    failed: dict[str, str] = {}
    with ExitStack() as opened:
        stagers = {name: make() for name, make in STAGERS.items()}
        for stager in stagers.values():
            opened.callback(stager.close)
            if isinstance(stager, WorkerStager):
                stager.stage({}).result()  # its processes have started
        order = list(stagers)
        for number in range(rounds + 1):
            random.Random(number).shuffle(order)
            for name in [one for one in order if one not in failed]:
                try:
                    took = _stage(stagers[name], state, _loop if loop and number else _no_loop)
                except (RuntimeError, OSError) as error:
                    failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
                if name in failed:
                    stagers[name].close()
                    gc.collect()  # it may have taken every descriptor, which the others need
                    continue
                for figure, secs in took.items():
                    figures.setdefault(name, {}).setdefault(figure if number else f"first {figure}", []).extend(secs)
    return {"case": case, "figures": figures, "failed": failed, "ratios": _ratios(figures)}


def _stage(stager: Any, state: dict[str, Any], loop: Callable[[Callable[[], object]], list[float]]) -> Figures:
    took: Figures = {}

    def stage() -> object:
        started, processor = time.perf_counter(), time.thread_time()
        staged = stager.stage(state)
        took["blocked"], took["of it"] = [time.perf_counter() - started], [time.thread_time() - processor]
        return staged

    started = time.perf_counter()
    staged = stage()
    if isinstance(staged, Future):
        staged = staged.result()
    took["staged"] = [time.perf_counter() - started]
    del staged
    costs = loop(lambda: stager.stage(state))
    return {**took, "loop": costs} if costs else took


def _no_loop(stage: Callable[[], object]) -> list[float]:
    return []


def _loop(stage: Callable[[], object]) -> list[float]:
    """Return what each of some stagings costs a loop that goes on meanwhile."""
    matrix = torch.randn(_WIDTH, _WIDTH)

    def products(count: int) -> float:
        started = time.perf_counter()
        for _ in range(count):
            torch.mm(matrix, matrix)
        return time.perf_counter() - started

    def with_staging() -> float:
        started = time.perf_counter()
        staged = stage()
        products(count)
        took = time.perf_counter() - started
        if isinstance(staged, Future):
            staged.result()
        return took

    count = int(_STRETCH_SECS / products(2000) * 2000)
    costs = []
    for pair in range(_PAIRS):  # A B, B A, ...
        before = products(count) if pair % 2 else 0.0
        both = with_staging()
        costs.append(both - (before or products(count)))
    return costs


def _ratios(figures: dict[str, Figures]) -> dict[str, dict[str, float]]:
    basis = figures[_BASIS]
    return {
        name: {
            figure: statistics.median(a / b for a, b in zip(values, basis[figure], strict=True))
            for figure, values in those.items()
            if figure == "staged"
        }
        for name, those in figures.items()
        if len(those["blocked"]) == len(basis["blocked"])
    }


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print, and write a JSON file if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=list(CASES))
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--loop", action="store_true", help="also measure what a staging costs a loop; takes minutes")
    parser.add_argument("--out", type=Path, help="write a JSON file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = []
    for case in options.case or CASES:
        results.append(measure(case, options.scale, options.rounds, loop=options.loop))
        _print(results[-1])
    if options.out is not None:
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    return results


def _print(one: dict[str, Any]) -> None:
    print(one["case"])
    for name, figures in one["figures"].items():
        print(f"  {name}")
        for figure, values in figures.items():
            low, middle, high = (1e3 * value for value in (min(values), statistics.median(values), max(values)))
            print(f"    {figure:14} {middle:9.1f} ms ({low:.1f} to {high:.1f})")
        for figure, ratio in one["ratios"].get(name, {}).items():
            print(f"    {figure} / that of {_BASIS}: {ratio:.2f}")
    for name, error in one["failed"].items():
        print(f"  {name}: {error}")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
