"""Every way to damage one small checkpoint a little, and whether ``verify`` and ``load`` see it.

python -m tests.safety.damage --count 200 --seed 1     prints what was tried, caught and missed
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from stager.loading.restore import Restorer
from stager.workers.checkpoint.directory.run_directory import CheckpointInfo, read_checkpoint
from stager.workers.checkpoint.documents.manifest import MANIFEST_NAME, Manifest
from stager.workers.checkpoint.read.verify import verify_checkpoint
from stager.workers.errors import CheckpointNotFoundError, CorruptCheckpointError
from tests.safety.checkpoints import draw_checkpoint
from tests.states import same


@dataclass
class Tally:
    """What was tried, by kind, and what went unseen."""

    tried: Counter[str] = field(default_factory=Counter)
    missed: list[str] = field(default_factory=list)
    num_checkpoints: int = 0

    def note(self, kind: str, seen: bool, what: str) -> None:
        self.tried[kind] += 1
        if not seen:
            self.missed.append(f"{kind}: {what}")

    def __str__(self) -> str:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.tried.items())
        return f"{self.num_checkpoints} checkpoints: {kinds}; {len(self.missed)} missed"


def attack(info: CheckpointInfo, tally: Tally, new_values: Callable[[int], list[int]]) -> None:
    """Damage every byte, every length, every file of a checkpoint, and undo it again.

    Args:
        new_values: of the old value of a byte: by what to replace it, one after the other.
    """
    path = Path(info.path)
    _, manifest = read_checkpoint(str(path.parent), info.step)
    for file in sorted(path.iterdir()):
        loaded = _loaded_bytes(manifest, file.name)
        _every_byte(file, tally, new_values, manifest, loaded)
        _every_length(file, tally, manifest, loaded)
        _missing(file, tally)
    _extra(path, tally)
    _swapped(path, tally)
    assert verify_checkpoint(path, num_threads=1).ok, "the damage was not undone"
    tally.num_checkpoints += 1


def _seen(path: Path, name: str, *, full: bool = True) -> bool:
    """Whether verify finds something, and names the file."""
    result = verify_checkpoint(path, full=full, num_threads=1)
    return not result.ok and any(name in problem for problem in result.problems)


def _strange(path: Path, name: str) -> bool:
    """Whether a file that is not of the checkpoint is noted, and is a problem only for a strict verification."""
    lax = verify_checkpoint(path, full=False, num_threads=1)
    strict = verify_checkpoint(path, full=False, strict=True, num_threads=1)
    return lax.ok and lax.strangers == (name,) and not strict.ok and name in strict.problems[0]


def _load_raises(path: Path, manifest: Manifest) -> bool:
    try:
        Restorer(str(path), manifest, 1, allow_pickle=False).load()
    except CorruptCheckpointError:
        return True
    return False


def _cannot_be_read(path: Path, step: int) -> bool:
    try:
        read_checkpoint(str(path.parent), step)
    except (CorruptCheckpointError, CheckpointNotFoundError):
        return True
    return False


def _loaded_bytes(manifest: Manifest, name: str) -> range:
    """Where in a file the items are that a load reads: the frames that end a file of the format ``torch`` are for others."""
    layout = manifest.layout
    spans = [
        (item.offset, end)
        for _, item, end in layout.spans()
        if layout.files[item.file].name == name and item.kind != "frame"
    ]
    return range(spans[0][0], spans[-1][1]) if spans else range(0)


def _every_byte(
    file: Path, tally: Tally, new_values: Callable[[int], list[int]], manifest: Manifest, loaded: range
) -> None:
    step = int(file.parent.name.removeprefix("step-"))
    fd = os.open(file, os.O_RDWR)
    try:
        for position, value in enumerate(file.read_bytes()):
            for new in new_values(value):
                os.pwrite(fd, bytes([new]), position)
                what = f"{file} byte {position}: {value} -> {new}"
                tally.note("bytes changed", _seen(file.parent, file.name), what)
                if position in loaded:
                    tally.note("loads with a byte changed", _load_raises(file.parent, manifest), what)
                elif file.name == MANIFEST_NAME:
                    tally.note("manifests read with a byte changed", _cannot_be_read(file.parent, step), what)
            os.pwrite(fd, bytes([value]), position)
    finally:
        os.close(fd)


def _every_length(file: Path, tally: Tally, manifest: Manifest, loaded: range) -> None:
    content = file.read_bytes()
    for length in range(len(content)):
        with _content(file, content[:length]):
            tally.note("truncations", _seen(file.parent, file.name), f"{file} at {length}")
            if length < loaded.stop and length % 16 == 0:
                tally.note("loads of a truncated file", _load_raises(file.parent, manifest), f"{file} at {length}")
    for more in (b"\0", content[-1:], bytes(4096)):
        with _content(file, content + more):
            tally.note("files grown", _seen(file.parent, file.name), f"{file} by {len(more)}")


@contextmanager
def _content(file: Path, content: bytes) -> Iterator[None]:
    original = file.read_bytes()
    file.write_bytes(content)
    try:
        yield
    finally:
        file.write_bytes(original)


def _missing(file: Path, tally: Tally) -> None:
    aside = file.parent.parent / "aside"
    file.rename(aside)
    for full in (True, False):
        tally.note("files missing", _seen(file.parent, file.name, full=full), str(file))
    aside.rename(file)


def _extra(path: Path, tally: Tally) -> None:
    """Whatever its kind and name: also names that stager itself uses while it writes."""
    make: dict[str, Callable[[Path], None]] = {
        "file": Path.touch,
        "directory": Path.mkdir,
        "link": lambda at: at.symlink_to("manifest.json"),
        "dangling link": lambda at: at.symlink_to("nowhere"),
        "FIFO": os.mkfifo,
    }
    for kind, create in make.items():
        for name in (
            "extra",
            ".hidden",
            "receipt-0-0-of-2.json",
            "save-0.json",
            "__9_0.distcp",
            "manifest.json.1.tmp",
            "\udcff",
        ):
            at = path / name
            create(at)
            tally.note("extra files", _strange(path, name), f"{kind} {name!r}")
            at.rmdir() if kind == "directory" else at.unlink()


def _swapped(path: Path, tally: Tally) -> None:
    """Two files of one checkpoint, of different content, in each other's place."""
    files = sorted(path.iterdir())
    for first, second in pairwise(files):
        one, other = first.read_bytes(), second.read_bytes()
        if one != other:
            with _content(first, other), _content(second, one):
                tally.note("files swapped", not verify_checkpoint(path, num_threads=1).ok, f"{first} and {second}")


def another_value(rng: random.Random) -> Callable[[int], list[int]]:
    return lambda value: [value ^ rng.randint(1, 255)]


def every_value(value: int) -> list[int]:
    return [new for new in range(256) if new != value]


def run(count: int, seed: int, directory: Path, start: int = 0) -> Tally:
    """Attack ``count`` random checkpoints, from number ``start`` on; of each, every byte once, with a random other value."""
    tally = Tally()
    for number in range(start, start + count):
        rng = random.Random(f"{seed}/{number}")
        info, state = draw_checkpoint(rng, directory / str(number))
        _, manifest = read_checkpoint(str(directory / str(number)), info.step)
        assert same(Restorer(info.path, manifest, 1, allow_pickle=False).load(), state)
        attack(info, tally, another_value(rng))
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--start", type=int, default=0, help="number of the first checkpoint")
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        tally = run(options.count, options.seed, Path(directory), options.start)
    print(f"{tally} ({time.monotonic() - started:.0f} s, seed {options.seed})")
    for line in tally.missed[:20]:
        print(line)
    return 1 if tally.missed else 0


if __name__ == "__main__":
    sys.exit(main())
