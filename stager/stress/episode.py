"""An episode: everything that was drawn for it, before anything happens. Plain data that goes to JSON and back."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass

from stager.stress.faults import Fault
from stager.stress.training import TrainingSpec

Ending = Literal["close", "forget", "exception", "exit", "os-exit"]
OnTerm = Literal["die", "exit", "save"]


@dataclass(frozen=True)
class RunPlan:
    """One run of the trainer: from the newest checkpoint to step ``until``, unless something ends it before.

    Attributes:
        until: the first step that this run does not take any more.
        ending: how it ends when it gets there: it closes its Checkpointer; forgets to; an exception leaves the ``with``
            block; ``sys.exit`` in it; ``os._exit`` in it, without a word to stager.
        on_term: what SIGTERM does: what it does to a Python program; ``sys.exit``; one last save after the current step.
        faults: see ``faults.py``; at most one for each point.
        peek_at: the number of the save (of this run) at which the directory is checked while everybody works; 0: not.
        hurried: another run opens the directory as soon as the trainer has ended, whatever its workers are doing then.
    """

    until: int
    ending: Ending = "close"
    on_term: OnTerm = "die"
    faults: tuple[Fault, ...] = ()
    peek_at: int = 0
    hurried: bool = False


@dataclass(frozen=True)
class Episode:
    """Attributes:
    seed, number: of the whole run of the command, and of this episode in it. They determine everything else.
    training: what is trained.
    save_every: steps from one save to the next.
    config: what the Checkpointer is given.
    guard, warmup: whether the trainer calls these.
    reads_futures: it looks at the errors of its saves; otherwise it leaves them to the next call.
    step_secs: an additional pause in each step, for the forward and backward of a real model.
    runs: in order; the last one goes to the end.
    small_disk: the run directory is a file system of its own.
    """

    seed: int
    number: int
    training: TrainingSpec
    save_every: int
    config: dict[str, dict[str, Any]]
    guard: bool
    warmup: bool
    reads_futures: bool
    step_secs: float
    runs: tuple[RunPlan, ...]
    small_disk: bool = False

    @property
    def num_steps(self) -> int:
        return self.runs[-1].until

    def saves_at(self, step: int) -> bool:
        return step % self.save_every == 0 or step == self.num_steps - 1

    @property
    def faults(self) -> tuple[Fault, ...]:
        return tuple(fault for run in self.runs for fault in run.faults)

    def to_json(self) -> bytes:
        return _EPISODE.dump_json(self, indent=2)

    @staticmethod
    def from_json(data: bytes) -> Episode:
        return _EPISODE.validate_json(data)


_EPISODE: TypeAdapter[Episode] = TypeAdapter(Episode)
