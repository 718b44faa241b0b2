"""Changes to documents, archives and files that a hostile writer could make, drawn at random from a seed."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import random
import re
import shutil
import stat
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stager.workers.checkpoint.documents.envelope import seal_json

_NUMBERS: list[Any] = [-1, 0, 1, 2, 7, 63, 64, 255, 1 << 31, 1 << 32, 1 << 40, (1 << 62) + 1, (1 << 63) - 1, 1 << 63,
    1 << 64, 10**300, -(1 << 63), 0.0, -0.0, 0.5, 1e18, 1e300, 1.0, True, False]  # fmt: skip
_TEXTS: list[Any] = ["", ".", "..", "../x", "../../canary", "/etc/passwd", "/dev/zero", "a/b", "a\0b", "x" * 300, "\n",
    "\x1b[2J", "\ud800", "manifest.json", ".metadata", "save-0.json", "receipt-0-0-of-2.json", "__0_0.distcp", "tensor",
    "object", "float32", "float64", "qint8", "bool", "os", "dict", "list", "odict", "chunks", "fifo", "link"]  # fmt: skip
_OTHERS: list[Any] = [None, [], {}, [[]], [0], [0, 0], {"": 0}, {"version": "x"}, ["list", []], ["dict", [], []]]


class Mark:
    """Leaves a mark where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._path),)


def hostile_value(rng: random.Random) -> Any:
    kind = rng.random()
    if kind < 0.5:
        return rng.choice(_NUMBERS)
    if kind < 0.8:
        return rng.choice(_TEXTS)
    if kind < 0.95:
        return _copied(rng.choice(_OTHERS))
    if kind < 0.97:
        return _nested(rng.choice((5, 90, 150, 250)))
    return [rng.choice((0, 1, (1 << 62) + 1)) for _ in range(rng.choice((3, 70, 2000, 50_000)))]


def _nested(depth: int) -> Any:
    node: Any = 0
    for _ in range(depth):
        node = ["list", [node]]
    return node


def mutate_json(rng: random.Random, document: Any) -> Any:
    """``document`` (changed in place) with one place of it different."""
    if not document:
        return document
    place, key = _any_place(rng, document)
    value, kind = place[key], rng.random()
    if kind < 0.45:
        place[key] = hostile_value(rng)
    elif kind < 0.65 and type(value) in (int, float):
        place[key] = rng.choice((value + 1, value - 1, -value, value * 2, float(value), value ^ (1 << rng.randrange(62))
                                 if type(value) is int else value))  # fmt: skip
    elif kind < 0.75:
        other, other_key = _any_place(rng, document)
        place[key] = _copied(other[other_key])
    elif kind < 0.85 and isinstance(place, list):
        place.insert(key, _copied(value))
    elif kind < 0.9:
        del place[key]
    elif isinstance(value, list) and value:
        rng.shuffle(value) if rng.random() < 0.5 else value.extend(value[: rng.randint(1, 3)])
    else:
        place[key] = hostile_value(rng)
    return document


def _copied(value: Any) -> Any:
    """Copy a value, so that what is done to the one is not done to the other; None if it is nested too deeply."""
    try:
        return copy.deepcopy(value)
    except RecursionError:
        return None


def _any_place(rng: random.Random, document: Any) -> tuple[Any, Any]:
    place = document
    for _ in range(50):
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = rng.choice(keys)
        if not isinstance(place[key], (dict, list)) or not place[key] or rng.random() < 0.25:
            break
        place = place[key]
    return place, key


def sealed(rng: random.Random, body: Any) -> bytes:
    """Sealed as it should be, so that only what it says is wrong; sometimes with keys twice, or nested without end."""
    text = json.dumps(body)
    if rng.random() < 0.05:
        text = text.replace(
            '": ', f'": {json.dumps(hostile_value(rng))}, "{rng.choice(("step", "files", "rows"))}": ', 1
        )
    if rng.random() < 0.02:
        text = text.replace("0", rng.choice(("[" * 100_000, "9" * 5000, "1e999", "NaN", "-Infinity")), 1)
    return seal_json(text.encode(errors="surrogatepass"))


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """Bits flipped, bytes cut out, doubled, overwritten."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5, 40))):
        if not changed:
            break
        at, kind = rng.randrange(len(changed)), rng.random()
        length = min(rng.choice((1, 2, 4, 8, 100)), len(changed) - at)
        if kind < 0.4:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind < 0.6:
            changed[at : at + length] = rng.randbytes(length)
        elif kind < 0.75:
            del changed[at : at + length]
        elif kind < 0.9:
            changed[at:at] = changed[at : at + length]
        else:
            number = rng.choice((0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, (1 << 64) - 1))
            changed[at : at + 8] = struct.pack("<Q", number)[: rng.choice((2, 4, 8))]
    return bytes(changed)


def mutate_archive(rng: random.Random, blob: bytes, mark: Path) -> bytes:
    """What ``torch.save`` wrote, with another pickle in it, or packed in another way."""
    try:
        with zipfile.ZipFile(io.BytesIO(blob)) as archive:
            records = {name: archive.read(name) for name in archive.namelist()}
    except Exception:  # noqa: BLE001  # spoiled before
        return mutate_bytes(rng, blob)
    names = [name for name in records if name.endswith("data.pkl")] or list(records)
    kind = rng.random()
    if kind < 0.4:
        records[names[0]] = mutate_pickle(rng, records[names[0]], mark)
    elif kind < 0.5:
        return two_faced(rng, records, names[0], mark)
    elif kind < 0.55:
        records[names[0]] = lengthen_storages(rng, records[names[0]])
    elif kind < 0.7:
        name = rng.choice(list(records))
        records[name] = mutate_bytes(rng, records[name]) if rng.random() < 0.8 else bytes(20 << 20)
    elif kind < 0.75:
        records.pop(rng.choice(list(records)))
    else:
        return mutate_bytes(rng, blob)
    return _pack(records, zipfile.ZIP_DEFLATED if rng.random() < 0.2 else zipfile.ZIP_STORED)


def _pack(records: dict[str, bytes], how: int = zipfile.ZIP_STORED) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", how) as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    return packed.getvalue()


def two_faced(rng: random.Random, records: dict[str, bytes], pickled: str, mark: Path) -> bytes:
    """An archive in which one reader of zip files finds a harmless pickle and another one a hostile one."""
    hostile = {**records, pickled: rng.choice(HOSTILE_PICKLES)(mark)}
    kind = rng.random()
    if kind < 0.3:  # torch does not tell capitals
        twins = [*records.items(), (pickled.replace("data.pkl", "DATA.PKL"), hostile[pickled])]
        return _pack(dict(twins if rng.random() < 0.5 else twins[::-1]))
    if kind < 0.7:  # Python takes what is before an archive for something else, and looks behind it
        return _pack(hostile) + _pack(records) if rng.random() < 0.5 else _pack(records) + _pack(hostile)
    packed, comment = _pack(records), _pack(hostile)  # an archive in the comment of an archive
    return packed[:-2] + struct.pack("<H", len(comment) & 0xFFFF) + comment


_LENGTH = re.compile(rb"(cpu(?:q.)?)K.", re.DOTALL)


def lengthen_storages(rng: random.Random, data: bytes) -> bytes:
    """A pickle that says that its storages have more elements than there are bytes."""
    return _LENGTH.sub(lambda found: found[1] + b"J" + struct.pack("<i", rng.choice((7, 1000, 1 << 20))), data)


def mutate_pickle(rng: random.Random, data: bytes, mark: Path) -> bytes:
    if rng.random() < 0.5:
        return mutate_bytes(rng, data)
    return rng.choice(HOSTILE_PICKLES)(mark)


def _doubling(levels: int) -> bytes:
    """A key that takes 2 ** levels steps to hash."""
    tuples = b"".join(b"h%ch%c\x86q%c" % (n, n, n + 1) for n in range(levels))
    return b"\x80\x02}K\x01q\x00" + b"0" + tuples + b"K\x01s."


def _deep_tuple(depth: int) -> bytes:
    return b"\x80\x02}K\x01" + b"\x85" * depth + b"K\x01s."


_SET_ON_CLASS = b"}X\x08\x00\x00\x00poisonedK\x01s\x86"

HOSTILE_PICKLES: list[Callable[[Path], bytes]] = [
    lambda mark: pickle.dumps(Mark(mark)),
    lambda mark: pickle.dumps(Mark(mark), protocol=2),
    lambda mark: pickle.dumps(Mark(mark), protocol=0),
    lambda mark: b"cos\nmkdir\n(V%s\ntR." % str(mark).encode(),
    lambda mark: b"(ios\nmkdir\n." ,
    lambda mark: b"\x80\x02cbuiltins\neval\nX\x05\x00\x00\x001+1+1\x85R.",
    lambda mark: b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x00\x10\x85R.",
    lambda mark: _doubling(60),
    lambda mark: _deep_tuple(1_000_000),
    lambda mark: b"\x80\x02Nr\xff\xff\xff\x7f.",  # a memo of two billion entries
    lambda mark: b"\x80\x04\x96" + struct.pack("<Q", 1 << 36) + b".",  # a bytearray of 64 GiB
    lambda mark: b"\x80\x04\x8d" + struct.pack("<Q", 1 << 62) + b".",
    lambda mark: b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b"N.",
    lambda mark: b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
    lambda mark: b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadataIndex\nN" + _SET_ON_CLASS + b"b.",
    lambda mark: b"\x80\x02cpathlib\nPosixPath\nN" + _SET_ON_CLASS + b"b.",
    lambda mark: b"\x80\x02ccollections\nOrderedDict\nN" + _SET_ON_CLASS + b"b.",
]  # fmt: skip


def mutate_file(rng: random.Random, path: Path, outside: Path) -> None:
    """Another kind of file in its place, or another length; links lead outside."""
    kind = rng.choice(
        ("link", "device", "fifo", "directory", "socket", "missing", "short", "sparse", "empty", "dangling")
    )
    size = path.stat().st_size if path.is_file() else 0
    if kind in ("short", "sparse", "empty") and not path.is_symlink() and path.is_file():
        os.truncate(path, {"short": rng.randrange(size + 1), "sparse": size + (48 << 20), "empty": 0}[kind])
        return
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    if kind == "link":
        path.symlink_to(outside)
    elif kind == "device":
        path.symlink_to(rng.choice(("/dev/zero", "/dev/full", "/dev/tty")))
    elif kind == "dangling":
        path.symlink_to(path)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "socket":
        os.mknod(path, stat.S_IFSOCK | 0o600)
