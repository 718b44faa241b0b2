"""What a child reports, one JSON line each. Seconds, bytes and counts; no I/O here."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any


class Outcome(Enum):
    """How a peer fared on a case."""

    OK = "ok"
    FAILED = "failed"
    DEADLINE = "deadline"
    NOT_INSTALLED = "not installed"
    NOT_POSSIBLE = "not possible"


@dataclass(frozen=True, slots=True)
class Opened:
    """The peer is ready for its first save."""

    round: int
    open_secs: float
    warmup_secs: float | None


@dataclass(frozen=True, slots=True)
class Limits:
    """What the machine did with the same bytes, right before a save.

    Attributes:
        memcpy_secs: into warm memory, one thread.
        memcpy_threads_secs: with as many threads as stager copies with.
        foreach_secs: ``torch._foreach_copy_`` over all tensors; None where there are few.
        write_secs: pwrite in 16 MiB pieces, and fsync.
    """

    memcpy_secs: float
    memcpy_threads_secs: float
    foreach_secs: float | None
    write_secs: float


@dataclass(frozen=True, slots=True)
class Save:
    """One save. ``index`` 0 is the first of its process.

    Attributes:
        blocked_secs: until the call returned.
        staged_secs: until the state may be changed in any way.
        stored_secs: until it is stored as well as the peer stores it.
    """

    round: int
    index: int
    blocked_secs: float
    staged_secs: float
    stored_secs: float
    limits: Limits


@dataclass(frozen=True, slots=True)
class Load:
    """Back into the same tensors, the files being in the page cache."""

    round: int
    secs: float


@dataclass(frozen=True, slots=True)
class Speed:
    """A one-thread compute loop, alone and while a staged save was being stored. Iterations per second."""

    round: int
    alone_per_sec: float
    saving_per_sec: float
    in_flight_secs: float


@dataclass(frozen=True, slots=True)
class Descriptors:
    """Open descriptors of the trainer: before the peer was opened, and after the saves."""

    round: int
    before: int
    after: int


@dataclass(frozen=True, slots=True)
class Ready:
    """The state is built, the peer is not open yet: from here on memory is watched."""

    pss_bytes: int


@dataclass(frozen=True, slots=True)
class Memory:
    """Of the whole process tree, shared pages counted once (the sum of PSS).

    Attributes:
        base_bytes: interpreter, torch and the state, before the peer was opened.
        peak_bytes: the most that was seen from there on.
        num_processes: the most processes that were seen at once.
    """

    base_bytes: int
    peak_bytes: int
    num_processes: int
    num_readings: int


@dataclass(frozen=True, slots=True)
class Stretch:
    """A pair of stretches of the training loop, without saves and with one save each.

    Attributes:
        blocked_secs: of it in ``save()`` and in waiting before the optimizer's step.
        stored_in_time: the checkpoint was stored before the stretch was over.
        compute_secs: forward and backward of one step, without saves.
    """

    round: int
    pair: int
    num_steps: int
    without_secs: float
    with_secs: float
    blocked_secs: float
    compute_secs: float
    stored_in_time: bool
    memcpy_secs: float
    memcpy_threads_secs: float


@dataclass(frozen=True, slots=True)
class SoakPoint:
    """What the tree holds after so many saves."""

    saves: int
    pss_bytes: int
    trainer_pss_bytes: int
    trainer_fds: int
    all_fds: int
    num_processes: int
    elapsed_secs: float


@dataclass(frozen=True, slots=True)
class State:
    """The state that is saved."""

    nbytes: int
    num_tensors: int


@dataclass(frozen=True, slots=True)
class Failure:
    """Why there is no more to report."""

    outcome: str
    message: str


@dataclass(frozen=True, slots=True)
class Finished:
    """The peer is closed; what is left is the end of the process."""


Record = Opened | Save | Load | Speed | Descriptors | Ready | Memory | Stretch | SoakPoint | State | Failure | Finished
_KINDS: dict[str, Any] = {
    kind.__name__: kind
    for kind in (
        Opened,
        Save,
        Load,
        Speed,
        Descriptors,
        Ready,
        Memory,
        Stretch,
        SoakPoint,
        State,
        Failure,
        Finished,
    )
}


def to_json(record: Record) -> dict[str, Any]:
    return {"record": type(record).__name__, **asdict(record)}


def from_json(value: dict[str, Any]) -> Record:
    fields = dict(value)
    kind = _KINDS[fields.pop("record")]
    if kind is Save:
        fields["limits"] = Limits(**fields["limits"])
    record: Record = kind(**fields)
    return record


def to_line(record: Record) -> str:
    return json.dumps(to_json(record)) + "\n"
