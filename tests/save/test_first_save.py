"""What is made ready before the first save, in the background."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stager import Checkpointer
from stager.state.optimizer_states import expected_nbytes
from tests.waiting import wait_until

MIB = 1 << 20


def _parameters() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.randn(n)) for n in (MIB, 3 * MIB, 5)]


@pytest.mark.parametrize(
    "make",
    [
        torch.optim.AdamW,
        torch.optim.Adam,
        lambda p: torch.optim.Adam(p, amsgrad=True),
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    ],
)
def test_size_of_an_optimizers_state_is_known_before_its_first_step(
    make: Callable[[Any], torch.optim.Optimizer],
) -> None:
    parameters = _parameters()
    optimizer = make(parameters)
    before = expected_nbytes([optimizer], 1)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    after = expected_nbytes([optimizer], 1)
    held = [*parameters, *(value for state in optimizer.state.values() for value in state.values())]
    assert after == sum(tensor.nbytes for tensor in held if torch.is_tensor(tensor))
    assert before is not None and after - before in (0, 4 * len(parameters))  # the steps that were counted
    assert expected_nbytes([optimizer], 4) == pytest.approx(after / 4, abs=len(parameters))


def test_nothing_is_guessed_of_what_cannot_be_known() -> None:
    lazy = torch.nn.LazyLinear(3)
    assert expected_nbytes([torch.optim.RMSprop(_parameters())], 1) is None
    assert expected_nbytes([torch.optim.SGD(lazy.parameters(), lr=0.1)], 1) is None
    assert expected_nbytes([], 1) == 0


class _Odd(torch.optim.Adam):
    """An optimizer of the user's: its groups lack what Adam's have, and its state is no dict."""

    def __init__(self, parameters: list[torch.nn.Parameter], state: Any) -> None:
        super().__init__(parameters)
        for group in self.param_groups:
            del group["amsgrad"]
        for parameter in parameters:
            self.state[parameter] = state


@pytest.mark.parametrize("state", [None, [torch.ones(3)], torch.ones(3), 7], ids=["none", "list", "tensor", "number"])
def test_guard_takes_optimizers_of_which_nothing_is_known(run_dir: Path, state: Any) -> None:
    with Checkpointer(run_dir, {"persistence": {"fsync": False}, "workers": {"count": 1}}) as ckpt:
        ckpt.guard(_Odd(_parameters(), state))


def test_guard_takes_sparse_parameters_and_states(run_dir: Path) -> None:
    embedding = torch.nn.Embedding(10, 3, sparse=True)
    optimizer = torch.optim.SGD(embedding.parameters(), lr=0.1, momentum=0.9)
    embedding(torch.tensor([1, 2])).sum().backward()
    optimizer.step()
    sparse = torch.nn.Parameter(torch.eye(3).to_sparse())
    with Checkpointer(run_dir, {"persistence": {"fsync": False}, "workers": {"count": 1}}) as ckpt:
        ckpt.guard(optimizer, torch.optim.SGD([sparse], lr=0.1))
        ckpt.save(1, {"model": embedding, "optimizer": optimizer}).upload_completion.result()


def _slabs(ckpt: Checkpointer) -> int:
    arena = ckpt._run.arena  # type: ignore[attr-defined]  # nothing else tells how much is prepared
    return int(arena.nbytes)


def test_guard_prepares_memory_that_the_first_save_uses(run_dir: Path) -> None:
    parameters = _parameters()
    optimizer = torch.optim.AdamW(parameters)
    with Checkpointer(run_dir, {"persistence": {"fsync": False}, "workers": {"count": 1}}) as ckpt:
        ckpt.guard(optimizer)
        wait_until(lambda: _slabs(ckpt) >= 2 * 3 * 16 * MIB)
        prepared = _slabs(ckpt)
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        ckpt.save(1, {"model": parameters, "optimizer": optimizer}).upload_completion.result()
        assert _slabs(ckpt) == prepared


def test_optimizers_that_are_guarded_one_by_one_are_prepared_for_together(run_dir: Path) -> None:
    first, second = torch.optim.AdamW(_parameters()), torch.optim.AdamW(_parameters())
    with Checkpointer(run_dir, {"persistence": {"fsync": False}, "workers": {"count": 1}}) as ckpt:
        ckpt.guard(first)
        ckpt.guard(second)
        wait_until(lambda: _slabs(ckpt) >= 4 * 3 * 16 * MIB)
        parameters = [group["params"] for one in (first, second) for group in one.param_groups]
        prepared = _slabs(ckpt)
        for parameter in [one for some in parameters for one in some]:
            parameter.grad = torch.ones_like(parameter)
        first.step()
        second.step()
        ckpt.save(1, {"model": parameters, "optimizers": [first, second]}).upload_completion.result()
        assert _slabs(ckpt) <= prepared  # what the first guess was given is freed meanwhile


def test_small_states_and_saved_ones_are_not_guessed(run_dir: Path) -> None:
    small, large = torch.nn.Parameter(torch.randn(10)), torch.nn.Parameter(torch.randn(8 * MIB))
    with Checkpointer(run_dir, {"persistence": {"fsync": False}, "workers": {"count": 1}}) as ckpt:
        ckpt.guard(torch.optim.AdamW([small]))
        assert _slabs(ckpt) == 0
        ckpt.save(1, {"x": small}).upload_completion.result()
        known = _slabs(ckpt)
        ckpt.guard(torch.optim.AdamW([large]))  # a part of a state, or not: its size was seen
        ckpt.save(2, {"x": small}).upload_completion.result()
        assert _slabs(ckpt) <= 2 * known


def test_run_that_goes_on_prepares_memory_for_a_state_as_large_as_the_last(run_dir: Path) -> None:
    config = {"persistence": {"fsync": False}, "workers": {"count": 1}}
    state = {"x": torch.randn(8 * MIB)}
    with Checkpointer(run_dir, config) as ckpt:
        ckpt.save(1, state).upload_completion.result()
    with Checkpointer(run_dir, config) as ckpt:  # it neither loads nor guards
        wait_until(lambda: _slabs(ckpt) >= 2 * 32 * MIB)
        prepared = _slabs(ckpt)
        ckpt.save(2, state).upload_completion.result()
        assert _slabs(ckpt) == prepared


def test_first_save_imports_nothing(run_dir: Path) -> None:
    """In an interpreter of its own. The thread that does it is waited for, and nothing else of the first save is done."""
    program = (
        "import sys, threading, torch\n"
        "from stager import Checkpointer\n"
        f"with Checkpointer({str(run_dir)!r}, {{'persistence': {{'fsync': False}}, 'workers': {{'count': 1}}}}) as ckpt:\n"
        "    [t.join() for t in threading.enumerate() if t.name == 'stager-rehearse']\n"
        "    before = set(sys.modules)\n"
        "    ckpt.save(1, {'model': torch.nn.Linear(3, 3), 'step': 1}).upload_completion.result()\n"
        "    print(sorted(set(sys.modules) - before))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", done.stdout
