"""What can be done to a run. Plain data: a plan holds them, ``inflictor.py`` and ``damage.py`` do them.

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

    ``detail``: the errno's name, or the seconds of a delay. ``relief`` and ``pause_secs``: what is done, and after how long,
    to a stopped process that nobody else can help: a trainer, or a worker without one.
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
        if self.action in ("raise", "errno", "delay"):
            return {"raise": "exception", "errno": self.detail, "delay": "slow"}[self.action] + f" at {self.group}"
        names = {"kill": "SIGKILL", "stop": "SIGSTOP", "segv": "SIGSEGV", "exit": "os._exit"}
        return f"{names[self.action]} at {self.group}"

    @property
    def group(self) -> str:
        return f"{self.point.split('.')[0]}.*"

    @property
    def is_deadly(self) -> bool:
        return self.action in DEADLY

    @property
    def stops(self) -> bool:
        return self.action == "stop"

    @property
    def of_trainer(self) -> bool:
        return self.point in TRAINER_POINTS

    def describe(self) -> str:
        visits = f" after {self.after} visits" if self.after else ""
        return f"{self.action} {self.detail} at {self.point}{visits}".replace("  ", " ")


@dataclass(frozen=True)
class SignalFault:
    """``signal`` to the trainer, a worker, or any of them, ``delay_secs`` after the save number ``save`` of this run began
    (0: after the Checkpointer was made)."""

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
        """Also to a worker, which does not heed the other two."""
        return self.signal == "SIGKILL"

    @property
    def stops(self) -> bool:
        return self.signal == "SIGSTOP"

    @property
    def label(self) -> str:
        whom = {"trainer": "the trainer", "worker": "a worker", "any": "any process"}[self.target]
        return f"{self.signal} to {whom}"

    def describe(self) -> str:
        return f"{self.label}, {self.delay_secs:.3f} s after save {self.save} began"


@dataclass(frozen=True)
class FullDisk:
    """From save number ``save`` on the disk has only ``free_bytes`` left, until a save has failed or ``secs`` are over."""

    save: int
    free_bytes: int
    secs: float
    kind: Literal["full-disk"] = "full-disk"

    @property
    def label(self) -> str:
        return "full disk"

    def describe(self) -> str:
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
        return "memory pressure"

    def describe(self) -> str:
        return f"{self.nbytes >> 20} MiB of memory taken for {self.secs:.1f} s at save {self.save}"


@dataclass(frozen=True)
class RemovePartial:
    """The first partial directory that is seen once save number ``save`` has begun is removed."""

    save: int
    kind: Literal["removed"] = "removed"

    @property
    def label(self) -> str:
        return "partial directory removed"

    def describe(self) -> str:
        return f"the partial directory of save {self.save} or later removed"


@dataclass(frozen=True)
class Damage:
    """Before the run starts, a committed checkpoint is damaged. ``file`` and ``place`` are shares of what there is."""

    how: How
    newest: bool
    file: float
    place: float
    kind: Literal["damage"] = "damage"

    @property
    def label(self) -> str:
        words = {
            "flip": "a bit flipped",
            "truncate": "a file cut",
            "remove": "a file removed",
            "extend": "a file longer",
        }
        return f"{words[self.how]} in a checkpoint"

    def describe(self) -> str:
        return f"{self.label} ({'the newest' if self.newest else 'any'})"


Fault = Annotated[PointFault | SignalFault | FullDisk | Pressure | RemovePartial | Damage, Field(discriminator="kind")]
