"""Trainers that end in every possible way, for ``nursery.py``. They tell on stdout how far they are."""

from __future__ import annotations

import os
import signal
import sys

import torch
from torch import nn

from stager import Checkpointer
from stager.workers.pool.roster import Roster

ORPHAN_TIMEOUT_SECS = 300.0
CONFIG = {"workers": {"count": 1, "orphan_timeout_secs": ORPHAN_TIMEOUT_SECS}, "persistence": {"fsync": False}}


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())


def value_of(step: int) -> int:
    """What every element is at a step."""
    return step * 7 + 1


def state_of(step: int, nbytes: int) -> dict[str, torch.Tensor]:
    return {"x": torch.full((nbytes // 8,), value_of(step), dtype=torch.int64), "y": torch.tensor(value_of(step))}


def delete_in_flight(directory: str) -> None:
    """Save step 0 to the end; begin step 1, and delete it."""
    with Checkpointer(directory, CONFIG) as ckpt:
        ckpt.save(0, state_of(0, 1 << 20)).upload_completion.result()
        say("base")
        ckpt.save(1, state_of(1, 1 << 20))
        ckpt.delete(1)


# -- one save, and the end ------------------------------------------------------------------------------------------


def end(directory: str, way: str) -> None:
    """Save step 0 to the end, and begin step 1; then end in some way. Whoever started us holds what is to be held."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests that are run by nohup inherit that it is ignored
    ckpt = Checkpointer(directory, CONFIG)
    if way == "never closes":
        save_two(ckpt)
        return
    say_when_draining()
    with ckpt:
        save_two(ckpt)
        if way == "raises":
            raise KeyError("primary")
        if way == "calls sys.exit":
            sys.exit(5)
        if way == "calls os._exit":
            os._exit(6)
        if way == "is signalled":
            signal.pause()


def save_two(ckpt: Checkpointer) -> None:
    ckpt.save(0, state_of(0, 1 << 20)).upload_completion.result()
    say("base")
    ckpt.save(1, state_of(1, 1 << 20)).staging_completion.result()
    say("staged")


def say_when_draining() -> None:
    original = Roster.drain

    def drain(self: Roster, timeout: float | None) -> bool:
        say("draining")
        return original(self, timeout)

    Roster.drain = drain


def end_while_staging(directory: str) -> None:
    """The save of a guarded state: it is copied after ``save()`` has returned, by a thread that is held."""
    model = nn.Linear(64, 64)
    optimizer = torch.optim.SGD(model.parameters())
    with Checkpointer(directory, CONFIG) as ckpt:
        ckpt.save(0, state_of(0, 1 << 20)).upload_completion.result()
        ckpt.guard(optimizer)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(value_of(1))
        handle = ckpt.save(1, {"x": model.weight, "y": model.bias})
        say("staged" if handle.staging_completion.done() else "staging")


def end_half_filled(directory: str, num_mib: int, is_guarded: bool) -> None:
    """Save step 0, of a single element, to the end, and begin step 1, of several stretches."""
    parameters = [nn.Parameter(torch.full((1 << 18,), float(value_of(1)))) for _ in range(num_mib)]
    optimizer = torch.optim.SGD(parameters)
    with Checkpointer(directory, {**CONFIG, "workers": {**CONFIG["workers"], "count": 2}}) as ckpt:
        if is_guarded:
            ckpt.guard(optimizer)
        ckpt.save(0, {"x": torch.tensor(value_of(0))}).upload_completion.result()
        say("base")
        ckpt.save(
            1, {str(number): parameter for number, parameter in enumerate(parameters)}
        ).staging_completion.result()
        say("staged")
        signal.pause()


# -- many saves -----------------------------------------------------------------------------------------------------


def save_and_die(directory: str, step: int, nbytes: int) -> None:
    ckpt = Checkpointer(directory, CONFIG)
    ckpt.save(step, state_of(step, nbytes)).staging_completion.result()
    os.kill(os.getpid(), signal.SIGKILL)


def save_forever(directory: str, num_workers: int, nbytes: int) -> None:
    """Every save is another step, on from whatever is there. Says ``staged N`` and ``committed N``."""
    workers = {"count": num_workers, "orphan_timeout_secs": ORPHAN_TIMEOUT_SECS}
    with Checkpointer(directory, {**CONFIG, "workers": workers}) as ckpt:
        latest = ckpt.latest()
        step = 0 if latest is None else latest.step + 1
        say("up")
        while True:
            handle = ckpt.save(step, state_of(step, nbytes))
            handle.staging_completion.result()
            say(f"staged {step}")
            handle.upload_completion.add_done_callback(lambda future, n=step: say_outcome(n, future))
            step += 1


def say_outcome(step: int, future: object) -> None:
    error = future.exception()
    say(f"committed {step}" if error is None else f"failed {step} {error!r}")


# -- preemption -----------------------------------------------------------------------------------------------------


def preempted(directory: str, deadline_secs: float | None) -> None:
    """A training loop that saves once more when it is told to, and leaves."""
    signal.signal(signal.SIGUSR1, lambda number, frame: say("chained"))
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    with Checkpointer(directory, CONFIG) as ckpt:
        preemption = ckpt.on_preemption(deadline_secs=deadline_secs)
        ckpt.save(0, state_of(0, 1 << 20)).upload_completion.result()
        say("base")
        while not preemption.requested:
            signal.pause()
        handle = ckpt.save(1, state_of(1, 1 << 20))
        assert preemption.signal is not None
        say(f"requested by {preemption.signal.name}")
    say(f"closed: {type(handle.upload_completion.exception()).__name__}")
    assert {number: signal.getsignal(number) for number in before} == before
