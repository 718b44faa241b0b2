"""What the ranks of a group tell each other: every message, and the one place that encodes them.

A message is posted to a key of the rendezvous (``keys.py``). It is a line of text: the name of its class, a space, its
fields as JSON. Each class says who posts it, when, and what answers it. "Rank 0" is the coordinator.

The rows of messages come first. Then the messages of the group, of an opening, of an agreement, of a save, of a load
(``loading/joint_loader.py``), of a restore from replicas, and of partners that exchange replicas.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, NamedTuple, cast, get_args, get_origin, get_type_hints

from typing_extensions import dataclass_transform

from stager.workers.checkpoint.commit.commit import Committed
from stager.workers.errors import InternalError

KINDS: dict[str, type[Message]] = {}
"""Every kind of message, by the name that it is posted under."""

_hints = cache(get_type_hints)


@dataclass_transform(frozen_default=True)
class Message:
    """Makes each subclass a frozen dataclass, and a kind of message that :func:`decode` knows."""

    def __init_subclass__(cls) -> None:
        KINDS[cls.__name__] = dataclass(frozen=True)(cls)


class LeafEntry(NamedTuple):
    """A leaf that other ranks may hold, too: name, what it is (dtype, or "object"), shape of the whole, place in it."""

    name: str
    kind: str
    shape: tuple[int, ...] = ()
    offsets: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()

    @property
    def what(self) -> str:
        """The leaf's type, for an error message."""
        return self.kind if self.kind == "object" else f"{self.kind} of shape {self.shape}"


class HolderRange(NamedTuple):
    """Of the ranks that hold a leaf: the position of the first one of a kind, how many hold it, which set they are."""

    begin: int
    total: int
    holders: int


class OfferedReplica(NamedTuple):
    """A replica that some host keeps: in which memory (see ``ReplicaOffer``), whose, and of which save.

    ``name``: of the checkpoint's directory.
    """

    place: str
    owner: int
    step: int
    save_id: str
    num_ranks: int
    created: float
    name: str


class Arrived(Message):
    """Each rank, when it comes to a barrier. ``BarrierEnd`` answers it.

    ``connects``: of an exchange of replicas, whether this rank needs a new connection.
    """

    connects: bool = False


class BarrierEnd(Message):
    """The first rank that sees that all came, or gives up. ``error`` is "" if all came; else ``ranks`` are to blame."""

    error: str = ""
    ranks: tuple[int, ...] = ()


class BroadcastFailed(Message):
    """Rank 0, in the place of what it was to broadcast. The other ranks raise ``RankFailedError``."""

    error: str


class Number(Message):
    """The first rank that has this number, where ranks look for the smallest; each rank, where it knows of a failed save.

    All ranks gather them. The first to do so posts the number of the ``save()`` that raises the failure.
    """

    value: int


class DirectoryOpened(Message):
    """Rank 0, when it holds the run's lock. The others then take the lock, too, and come to the barrier.

    ``nonce``: of the run, also in the lock file. ``replicates``: whether ``replication.partners`` is set on rank 0.
    """

    nonce: str
    directory: str
    replicates: bool


class KindOfRank(Message):
    """The first rank of each kind: the leaves that are not sharded, which all ranks of the kind have.

    ``WhoHolds`` answers it where there are several kinds. One kind needs no answer.
    """

    digest: str
    entries: tuple[LeafEntry, ...]


class LeafDigests(Message):
    """The first rank of its kind that has these values. ``ValuesCompared`` answers it where ranks have others.

    ``tensors``, ``others``: digests of leaves by name. Tensors have to be the same on all ranks; about others, rank 0 warns.
    """

    rank: int
    tensors: dict[str, str]
    others: dict[str, str]


class ValuesCompared(Message):
    """Rank 0, when it has compared the values of all ranks: which tensors differ, in words; or "", for none."""

    problem: str


class WhoHolds(Message):
    """Rank 0, to the ranks of one kind: for each of their entries who holds it; or the ``problem``, for all."""

    problem: str
    holders: tuple[HolderRange, ...]


class SaveCommitted(Message):
    """The rank whose worker committed, or any rank that finds the commit. The others resolve their Futures."""

    committed: Committed


class SaveFailed(Message):
    """The first rank on which a save fails, or that finds ``ranks`` missing at its deadline. The others fail, too.

    ``is_unfinished``: nothing failed, but the parts of ``ranks`` are missing. ``is_withdrawn``: nothing failed, but the
    checkpoint was deleted.
    """

    error: str
    ranks: tuple[int, ...]
    is_unfinished: bool = False
    is_withdrawn: bool = False


class EveryPartWritten(Message):
    """The rank that looks at the directory at its deadline: only the commit is missing. All wait once more."""


class NewestStep(Message):
    """Who posts ``SaveCommitted``; and rank 0 after a restore. Ranks then wait until they see it; -1: there is none."""

    step: int


class StepToLoad(Message):
    """Rank 0, at the begin of each try. All ranks load it and come to the barrier.

    ``step``: None if there is nothing to load. ``is_there``: False where a rank need not wait to see it.
    """

    step: int | None
    is_there: bool


class LoadFailed(Message):
    """The first rank on which a load failed, and the first that found damage. All ranks read it after the barrier."""

    rank: int
    error: str


class LoadNames(Message):
    """Names that a rank's target lacks; then, as the answer, those of them that a rank's target has.

    Of ranks with the same names, one posts them. Legal while all ranks load one checkpoint.
    """

    names: tuple[str, ...]


class MemoryPlace(Message):
    """Each rank: which memory it sees. The ranks that post the same place share one directory of replicas."""

    place: str


class ReplicaOffer(Message):
    """The first rank of each place: the whole replicas there. Rank 0 gathers them; ``RestoreChoice`` answers."""

    replicas: tuple[OfferedReplica, ...]


@dataclass(frozen=True)
class RestorePlan:
    """What is to be written of a save, in a ``RestoreChoice``.

    ``name``: of the checkpoint's directory.
    ``written_as``: the id of the partial directory; the save's own where parts of the save are on the disk already.
    ``owners``: by place, the ranks whose parts are written from the replicas there.
    """

    step: int
    name: str
    save_id: str
    written_as: str
    owners: dict[str, tuple[int, ...]]


class RestoreChoice(Message):
    """Rank 0: what is restored next. All write what the plan asks of them. ``RestoreEnd`` follows; without a plan, nothing.

    ``whole_id``: of the newest save that is whole in memory; "" if there is none.
    """

    plan: RestorePlan | None
    whole_id: str


class RestoreFailed(Message):
    """The first rank that could not write what the plan asked of it. ``errno`` is 0 if no file system failed."""

    errno: int
    message: str
    path: str


class RestoreEnd(Message):
    """Rank 0, when all have written: whether the checkpoint is whole now. If not, rank 0 makes another choice."""

    is_done: bool


class ReplicaFate(Message):
    """The last rank to receive its replica of a save, or the first to overwrite one. See replicator.py."""

    is_whole: bool


def encode(message: Message) -> bytes:
    """The text of a message, as it is posted. ASCII, so that file names that are no UTF-8 survive it."""
    return f"{type(message).__name__} {json.dumps(message, default=_fields, separators=(',', ':'))}".encode()


def decode(data: bytes) -> Message:
    """The message that :func:`encode` made.

    Raises:
        InternalError: the text is no message: another version of stager runs on another rank, or this is a defect.
    """
    name, _, body = data.partition(b" ")
    try:
        message: Message = _value(KINDS[name.decode()], json.loads(body))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InternalError(
            f"a rank posted {data[:80]!r}, which is no message of this version of stager; install the same "
            "version on all ranks. If it is the same already"
        ) from error
    return message


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in fields(value)}


def _value(hint: Any, value: Any) -> Any:
    """A field of the type ``hint``, from what JSON made of it: an object of a dataclass, a list of a tuple."""
    if is_dataclass(hint):
        kind = cast(Any, hint)
        return kind(**{name: _value(_hints(kind)[name], one) for name, one in value.items()})
    if hasattr(hint, "_fields"):
        return hint(*map(_value, _hints(hint).values(), value))
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is UnionType:  # of one type and None
        return None if value is None else _value(arguments[0], value)
    if origin is tuple:
        return tuple(value) if arguments[0] in (int, str) else tuple(_value(arguments[0], one) for one in value)
    if origin is dict:
        return {key: _value(arguments[1], one) for key, one in value.items()}
    return value
