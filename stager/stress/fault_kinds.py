"""The faults that a run can have: plain data. ``inflictor.py`` and ``damage.py`` carry them out.

Points are those of ``workers/faults.py``.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

TRAINER_POINTS = ("save.planned", "save.overlapped", "save.copied", "save.handed-over")
LIFE_POINTS = (
    "worker.start",
    "worker.import",
    "worker.ready",
    "task.receive",
    "task.run",
    "task.reply",
    "worker.shutdown",
)
PART_POINTS = ("part.begin", "part.opened", "part.write", "part.written", "part.synced", "part.receipt")
COMMIT_POINTS = ("commit.begin", "commit.indexed", "commit.manifest", "commit.published", "commit.replaced")
STORAGE_POINTS = (*PART_POINTS, *COMMIT_POINTS)
WORKER_POINTS = (*LIFE_POINTS, *STORAGE_POINTS)
ERRNOS = ("ENOSPC", "EIO", "EDQUOT", "EROFS", "EACCES", "ESTALE")

DEADLY = ("kill", "segv", "exit")
Action = Literal["kill", "stop", "segv", "exit", "raise", "errno", "delay"]
Relief = Literal["continue", "kill"]
Target = Literal["trainer", "worker", "any"]
SignalName = Literal["SIGKILL", "SIGSTOP", "SIGTERM", "SIGINT"]
How = Literal["flip", "truncate", "remove", "extend"]


@dataclass(frozen=True)
class PointFault:
    """The first process that reaches ``point`` for the ``after + 1``-th time does ``action``.

    Attributes:
        detail: name of the errno, or seconds of the delay.
        relief, pause_secs: what is done to a stopped process, and when, if nobody else can help it: a trainer, or a worker
            without one.
    """

    point: str
    action: Action
    after: int = 0
    detail: str = ""
    relief: Relief = "continue"
    pause_secs: float = 0.3
    kind: Literal["point"] = "point"

    @property
    def label(self) -> str:
        """A short name, the same for faults that are counted together."""
        if self.action in ("raise", "errno", "delay"):
            return {"raise": "exception", "errno": self.detail, "delay": "slow"}[self.action] + f" at {self.group}"
        names = {"kill": "SIGKILL", "stop": "SIGSTOP", "segv": "SIGSEGV", "exit": "os._exit"}
        return f"{names[self.action]} at {self.group}"

    @property
    def group(self) -> str:
        """The group of points that the point belongs to."""
        return f"{self.point.split('.')[0]}.*"

    @property
    def is_deadly(self) -> bool:
        """Whether the process ends."""
        return self.action in DEADLY

    @property
    def stops(self) -> bool:
        """Whether the process is stopped."""
        return self.action == "stop"

    @property
    def of_trainer(self) -> bool:
        """Whether only a trainer reaches the point."""
        return self.point in TRAINER_POINTS

    def describe(self) -> str:
        """The fault in words."""
        visits = f" after {self.after} visits" if self.after else ""
        return f"{self.action} {self.detail} at {self.point}{visits}".replace("  ", " ")


@dataclass(frozen=True)
class SignalFault:
    """A signal to the trainer, a worker, or any of them, ``delay_secs`` after save number ``save`` of the run began.

    Save number 0 stands for the moment at which the Checkpointer was made.
    """

    target: Target
    signal: SignalName
    save: int
    delay_secs: float
    pick: int = 0
    relief: Relief = "continue"
    pause_secs: float = 0.3
    kind: Literal["signal"] = "signal"

    @property
    def is_deadly(self) -> bool:
        """Whether any process ends; workers ignore SIGTERM and SIGINT."""
        return self.signal == "SIGKILL"

    @property
    def stops(self) -> bool:
        """Whether the process is stopped."""
        return self.signal == "SIGSTOP"

    @property
    def label(self) -> str:
        """A short name, the same for faults that are counted together."""
        whom = {"trainer": "the trainer", "worker": "a worker", "any": "any process"}[self.target]
        return f"{self.signal} to {whom}"

    def describe(self) -> str:
        """The fault in words."""
        return f"{self.label}, {self.delay_secs:.3f} s after save {self.save} began"


@dataclass(frozen=True)
class FullDisk:
    """The disk has only ``free_bytes`` left, from save number ``save`` until a save has failed or ``secs`` have passed."""

    save: int
    free_bytes: int
    secs: float
    kind: Literal["full-disk"] = "full-disk"

    @property
    def label(self) -> str:
        """A short name, the same for faults that are counted together."""
        return "full disk"

    def describe(self) -> str:
        """The fault in words."""
        return f"from save {self.save} on, {self.free_bytes:,} bytes are free on the disk"


@dataclass(frozen=True)
class Pressure:
    """At save number ``save``, another process takes ``nbytes`` of memory for ``secs``."""

    save: int
    nbytes: int
    secs: float
    kind: Literal["pressure"] = "pressure"

    @property
    def label(self) -> str:
        """A short name, the same for faults that are counted together."""
        return "memory pressure"

    def describe(self) -> str:
        """The fault in words."""
        return f"{self.nbytes >> 20} MiB of memory taken for {self.secs:.1f} s at save {self.save}"


@dataclass(frozen=True)
class RemovePartial:
    """The first partial directory seen after save number ``save`` began is removed."""

    save: int
    kind: Literal["removed"] = "removed"

    @property
    def label(self) -> str:
        """A short name, the same for faults that are counted together."""
        return "partial directory removed"

    def describe(self) -> str:
        """The fault in words."""
        return f"the partial directory of save {self.save} or later removed"


@dataclass(frozen=True)
class Damage:
    """A committed checkpoint is damaged before the run. ``file`` and ``place`` choose file and byte, as fractions of all."""

    how: How
    newest: bool
    file: float
    place: float
    kind: Literal["damage"] = "damage"

    @property
    def label(self) -> str:
        """A short name, the same for faults that are counted together."""
        words = {
            "flip": "a bit flipped",
            "truncate": "a file cut",
            "remove": "a file removed",
            "extend": "a file longer",
        }
        return f"{words[self.how]} in a checkpoint"

    def describe(self) -> str:
        """The fault in words."""
        return f"{self.label} ({'the newest' if self.newest else 'any'})"


Fault = Annotated[PointFault | SignalFault | FullDisk | Pressure | RemovePartial | Damage, Field(discriminator="kind")]
