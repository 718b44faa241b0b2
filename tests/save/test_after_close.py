"""Use after ``close()``: every public name of both classes either still works or says that it is closed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from stager import Checkpointer, ClosedError
from stager.workers import WorkerPool

# None: raises ClosedError.
CHECKPOINTER: dict[str, tuple[Callable[[Checkpointer], Any], Callable[[Any], bool] | None]] = {
    "save": (lambda c: c.save(1, {}), None),
    "listen": (lambda c: c.listen(print), None),
    "guard": (lambda c: c.guard(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])), None),
    "warmup": (lambda c: c.warmup({"x": torch.ones(1)}), None),
    "wait_for_staging": (lambda c: c.wait_for_staging(), None),
    "on_preemption": (lambda c: c.on_preemption(), None),
    "protect": (lambda c: c.protect(0), None),
    "unprotect": (lambda c: c.unprotect(0), None),
    "delete": (lambda c: c.delete(0), None),
    "prune": (lambda c: c.prune(), None),
    "checkpoints": (lambda c: [info.step for info in c.checkpoints()], lambda steps: steps == [0]),
    "latest": (lambda c: c.latest(), lambda info: info.step == 0),
    "latest_step": (lambda c: c.latest_step(), lambda found: found == 0),
    "load": (lambda c: c.load(0), lambda loaded: bool(torch.all(loaded.state["x"] == 1))),
    "skipped": (lambda c: c.skipped, lambda skipped: skipped == []),
    "close": (lambda c: c.close(), lambda nothing: nothing is None),
}
POOL: dict[str, tuple[Callable[[WorkerPool], Any], Callable[[Any], bool] | None]] = {
    "submit": (lambda p: p.submit(int), None),
    "submit_to": (lambda p: p.submit_to(Future(), int), None),
    "hand_over": (lambda p: p.hand_over(int), None),
    "wait_delivered": (lambda p: p.wait_delivered([Future()]), lambda nothing: nothing is None),
    "pids": (lambda p: p.pids, lambda pids: pids == ()),
    "health": (lambda p: p.health(), lambda rows: rows == ()),
    "in_callback": (lambda p: p.in_callback, lambda answer: answer is False),
    "drain": (lambda p: p.drain(), lambda drained: drained is True),
    "detach": (lambda p: p.detach(), lambda nothing: nothing is None),
    "close": (lambda p: p.close(), lambda nothing: nothing is None),
}


def check(closed: Any, table: dict[str, tuple[Callable[[Any], Any], Callable[[Any], bool] | None]]) -> None:
    public = {name for name in dir(type(closed)) if not name.startswith("_")}
    assert public == set(table)
    for name, (use, is_right) in table.items():
        if is_right is None:
            with pytest.raises(ClosedError, match="closed"):
                use(closed)
        else:
            assert is_right(use(closed)), name


def test_every_public_name_of_a_closed_checkpointer(run_dir: Path) -> None:
    with Checkpointer(run_dir, {"workers": {"count": 1}}) as ckpt:
        ckpt.save(0, {"x": torch.ones(10)})
    check(ckpt, CHECKPOINTER)


def test_every_public_name_of_a_closed_pool() -> None:
    with WorkerPool(count=1) as pool:
        pass
    check(pool, POOL)
