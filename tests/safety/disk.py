"""What a disk may hold after a power failure: of the calls so far, those that were synced, and any of the others.

The model is the weakest that POSIX allows. A file's bytes are safe after an fsync of the file, and its name after an fsync
of the directory; whatever was not synced may be there or not, each call for itself, a write also by half.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from tests.safety.recording import Call, Create, Exchange, Link, Recorder, Remove, Rename, Sync, Truncate, Write

Inodes = dict[int, dict[str, int] | bytes]


def pending(calls: Sequence[Call]) -> list[int]:
    """Which of ``calls`` are not on the disk for certain, by position."""
    synced: dict[int, int] = {}
    for position, call in enumerate(calls):
        if isinstance(call, Sync):
            synced[call.inode] = position
    return [
        position
        for position, call in enumerate(calls)
        if not isinstance(call, Sync) and any(synced.get(inode, -1) < position for inode in _to_sync(call))
    ]


def _to_sync(call: Call) -> list[int]:
    if isinstance(call, (Write, Truncate)):
        return [call.inode]
    if isinstance(call, Rename):
        return [call.parent, call.new_parent]
    return [call.parent] if isinstance(call, (Create, Exchange, Link, Remove)) else []


def outcomes(calls: Sequence[Call], rng: random.Random, num_random: int) -> Iterator[list[Call]]:
    """What may have reached the disk: nothing that was not synced, all of it, all but one, one alone, random subsets."""
    waiting = pending(calls)
    yield list(calls)
    yield _without(calls, waiting)
    for one in waiting:
        yield _without(calls, [one])
        yield _without(calls, [other for other in waiting if other != one])
        call = calls[one]
        if isinstance(call, Write) and len(call.data) > 1:
            yield [replace(call, data=call.data[: len(call.data) // 2]) if n == one else c for n, c in enumerate(calls)]
    for _ in range(num_random):
        yield _without(calls, [one for one in waiting if rng.random() < 0.5])


def _without(calls: Sequence[Call], lost: Sequence[int]) -> list[Call]:
    gone = set(lost)
    return [call for position, call in enumerate(calls) if position not in gone]


def disk_after(recorder: Recorder, calls: Sequence[Call]) -> Inodes:
    inodes: Inodes = {n: dict(v) if isinstance(v, dict) else v for n, v in recorder.before.items()}
    for call in recorder.calls:  # a file exists from its creation on, with or without a name
        if isinstance(call, Create):
            inodes[call.inode] = {} if call.is_directory else b""
    for call in calls:
        _apply(inodes, call)
    return inodes


def _apply(inodes: Inodes, call: Call) -> None:
    if isinstance(call, (Create, Link)):
        _names(inodes, call.parent)[call.name] = call.inode
    elif isinstance(call, Remove):
        _names(inodes, call.parent).pop(call.name, None)
    elif isinstance(call, Rename):
        names = _names(inodes, call.parent)
        if names.get(call.name) == call.inode:
            del names[call.name]
        _names(inodes, call.new_parent)[call.new_name] = call.inode
    elif isinstance(call, Exchange):
        names = _names(inodes, call.parent)
        names[call.first[0]], names[call.second[0]] = call.second[1], call.first[1]
    elif isinstance(call, Write):
        content = _bytes(inodes, call.inode).ljust(call.offset, b"\0")
        inodes[call.inode] = content[: call.offset] + call.data + content[call.offset + len(call.data) :]
    elif isinstance(call, Truncate):
        inodes[call.inode] = _bytes(inodes, call.inode)[: call.nbytes].ljust(call.nbytes, b"\0")


def _names(inodes: Inodes, inode: int) -> dict[str, int]:
    names = inodes[inode]
    assert isinstance(names, dict)
    return names


def _bytes(inodes: Inodes, inode: int) -> bytes:
    content = inodes[inode]
    assert isinstance(content, bytes)
    return content


def write_out(inodes: Inodes, root: int, path: Path) -> None:
    path.mkdir()
    for name, inode in _names(inodes, root).items():
        content = inodes[inode]
        if isinstance(content, dict):
            write_out(inodes, inode, path / name)
        else:
            (path / name).write_bytes(content)


def digest(inodes: Inodes, root: int) -> bytes:
    """Equal for disks that look the same."""
    hasher = hashlib.sha256()
    for name, inode in sorted(_names(inodes, root).items()):
        content = inodes[inode]
        inner = digest(inodes, inode) if isinstance(content, dict) else hashlib.sha256(content).digest()
        hasher.update(name.encode() + bytes([isinstance(content, dict)]) + inner)
    return hasher.digest()
