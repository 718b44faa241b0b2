"""The plan of an episode: plain data that is drawn before the episode is played, and can be written as JSON."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass

from stager.stress.fault_kinds import Fault
from stager.stress.training import TrainingSpec

Ending = Literal["close", "forget", "exception", "exit", "os-exit"]
OnTerm = Literal["die", "exit", "save"]


@dataclass(frozen=True)
class RunPlan:
    """The plan of one run of the trainer, from the newest checkpoint to step ``until``.

    Attributes:
        until: the first step that this run does not take any more.
        ending: how it ends when it gets there: it closes its Checkpointer; forgets to; an exception leaves the ``with``
            block; ``sys.exit`` in it; ``os._exit`` in it, without a word to stager.
        on_term: what SIGTERM does: what it does to a Python program; ``sys.exit``; one last save after the current step.
        faults: see ``fault_kinds.py``; at most one for each point.
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
    """One episode: what is trained, and what is done to it.

    Attributes:
        seed: of the command.
        number: of this episode. Seed and number determine all the rest.
        training: what is trained.
        save_every: number of steps from one save to the next.
        config: configuration of the Checkpointer.
        guard, warmup: whether the trainer calls these.
        reads_futures: the trainer looks at the Futures of its saves; otherwise the next call raises their errors.
        step_secs: an additional pause in each step, for the forward and backward of a real model.
        runs: in order; the last one trains to the last step.
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
        """Number of training steps."""
        return self.runs[-1].until

    def saves_at(self, step: int) -> bool:
        """Whether the trainer saves after this step."""
        return step % self.save_every == 0 or step == self.num_steps - 1

    @property
    def faults(self) -> tuple[Fault, ...]:
        """The faults of all runs."""
        return tuple(fault for run in self.runs for fault in run.faults)

    def to_json(self) -> bytes:
        """Write the episode as JSON."""
        return _EPISODE.dump_json(self, indent=2)

    @staticmethod
    def from_json(data: bytes) -> Episode:
        """Read an episode that :meth:`to_json` wrote."""
        return _EPISODE.validate_json(data)


_EPISODE: TypeAdapter[Episode] = TypeAdapter(Episode)
