"""How many requests it takes to look after many checkpoints: so many for each, however many there are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from stager import prune, recover, verify
from stager.workers.checkpoint.commit.persist import persist_part
from stager.workers.checkpoint.directory.run_directory import list_checkpoints
from tests.object_stores.proxy import Proxy
from tests.persistence.tasks import make_task


def _fill(run_url: str, steps: range) -> None:
    for step in steps:
        task = make_task(run_url, {"x": torch.full((8,), float(step))}, step=step, num_parts=1)  # type: ignore[arg-type]  # not a Path
        assert persist_part(task, 0).committed is not None


def _requests_of(proxy: Proxy, do: Callable[[], Any]) -> int:
    before = len(proxy.seen)
    do()
    return len(proxy.seen) - before


def _requests(proxy: Proxy, run_url: str) -> dict[str, int]:
    """Of each thing that is done with all checkpoints of a run, when there is nothing to remove."""
    paths = [info.path for info in list_checkpoints(run_url)[0]]
    return {
        "list": _requests_of(proxy, lambda: list_checkpoints(run_url)),
        "verify": _requests_of(proxy, lambda: [verify(path) for path in paths]),
        "prune": _requests_of(proxy, lambda: prune(run_url, keep_latest=len(paths))),
        "recover": _requests_of(proxy, lambda: recover(run_url)),
    }


@pytest.mark.parametrize("count", [8, pytest.param(1000, marks=[pytest.mark.long, pytest.mark.timeout(1800)])])
def test_requests_grow_as_the_number_of_checkpoints_does(proxy: Proxy, far_url: str, count: int) -> None:
    _fill(far_url, range(count // 2))
    half = _requests(proxy, far_url)
    _fill(far_url, range(count // 2, count))
    all_of_them = _requests(proxy, far_url)
    removed = _requests_of(proxy, lambda: prune(far_url, keep_latest=count // 2))
    print({name: (half[name], number) for name, number in all_of_them.items()}, "prune half:", removed)
    per_list = 2 * count // 1000  # one for a thousand keys, in each list that is made
    for name, number in all_of_them.items():
        assert number <= 2 * half[name] + per_list + 1, name
    assert len(list_checkpoints(far_url)[0]) == count // 2
