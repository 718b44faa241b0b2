"""The system calls by which a save changes the file system, recorded in their order, with inodes and bytes.

Several workers are several threads here, each of which waits for its turn at every recorded call; a seed deals the turns.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from stager.workers.checkpoint.storage.posix import files


@dataclass(frozen=True)
class Create:
    """A file or directory ``inode`` gets the name ``name`` in ``parent``."""

    parent: int
    name: str
    inode: int
    is_directory: bool


@dataclass(frozen=True)
class Link:
    """A file that is there already gets one more name."""

    parent: int
    name: str
    inode: int


@dataclass(frozen=True)
class Write:
    inode: int
    offset: int
    data: bytes


@dataclass(frozen=True)
class Truncate:
    inode: int
    nbytes: int


@dataclass(frozen=True)
class Sync:
    inode: int


@dataclass(frozen=True)
class Rename:
    parent: int
    name: str
    new_parent: int
    new_name: str
    inode: int


@dataclass(frozen=True)
class Exchange:
    parent: int
    first: tuple[str, int]  # name, inode
    second: tuple[str, int]


@dataclass(frozen=True)
class Remove:
    parent: int
    name: str


Call = Create | Link | Write | Truncate | Sync | Rename | Exchange | Remove


class Turns:
    """Lets one thread go on at a time, chosen at random whenever all of them wait."""

    def __init__(self, seed: int, num_threads: int) -> None:
        self._rng = random.Random(seed)
        self._alive = num_threads
        self._waiting: list[int] = []
        self._next: int | None = None
        self._changed = threading.Condition()

    def wait(self, number: int) -> None:
        with self._changed:
            self._waiting.append(number)
            self._choose()
            self._changed.wait_for(lambda: self._next == number, timeout=60)
            self._next = None
            self._waiting.remove(number)

    def leave(self) -> None:
        with self._changed:
            self._alive -= 1
            self._choose()

    def _choose(self) -> None:
        if self._waiting and len(self._waiting) == self._alive:
            self._next = self._rng.choice(sorted(self._waiting))
            self._changed.notify_all()


class Recorder:
    """Attributes:
    calls: what was done since the recording began.
    before: what was there: each directory's names, each file's bytes, by inode.
    root: inode of the run's directory.
    """

    def __init__(self, run_dir: Path) -> None:
        self.calls: list[Call] = []
        self.before: dict[int, dict[str, int] | bytes] = {}
        self._ids: dict[int, int] = {}
        self._own: set[int] = set()
        self.root = self._take(run_dir)
        self._turn = threading.local()

    def _take(self, path: Path) -> int:
        number = self._id(os.stat(path))
        self._own.add(number)
        if path.is_dir():
            self.before[number] = {child.name: self._take(child) for child in sorted(path.iterdir())}
        else:
            self.before[number] = path.read_bytes()
        return number

    def _id(self, stat: os.stat_result) -> int:
        """Numbers of the kernel come back when their file is gone; these do not."""
        return self._ids.setdefault(stat.st_ino, len(self._ids) + 1)

    def _new_id(self, stat: os.stat_result) -> int:
        self._ids[stat.st_ino] = max(self._ids.values()) + 1
        self._own.add(self._ids[stat.st_ino])
        return self._ids[stat.st_ino]

    def in_turn(self, turns: Turns, number: int, work: Callable[[], Any]) -> Any:
        """Run ``work`` in this thread as one of several."""
        self._turn.wait = lambda: turns.wait(number)
        try:
            return work()
        finally:
            turns.leave()

    def _parent(self, path: Any, dir_fd: int | None) -> tuple[int, str]:
        head, name = os.path.split(os.fspath(path))
        stat = os.stat(head) if dir_fd is None else os.fstat(dir_fd)
        return self._id(stat), name

    @contextmanager
    def recording(self) -> Iterator[None]:
        real = {
            name: getattr(os, name)
            for name in (
                "open",
                "mkdir",
                "rename",
                "unlink",
                "rmdir",
                "ftruncate",
                "fsync",
                "pwritev",
                "pwrite",
                "link",
            )
        }
        exchange = files.exchange

        def wait() -> None:
            getattr(self._turn, "wait", lambda: None)()

        def open_(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
            if not flags & os.O_CREAT:
                fd: int = real["open"](path, flags, mode, dir_fd=dir_fd)
                return fd
            wait()
            try:
                os.stat(path, dir_fd=dir_fd, follow_symlinks=False)
                new = False
            except FileNotFoundError:
                new = True
            fd = real["open"](path, flags, mode, dir_fd=dir_fd)
            if new:
                self.calls.append(Create(*self._parent(path, dir_fd), self._new_id(os.fstat(fd)), False))
            elif flags & os.O_TRUNC:
                self.calls.append(Truncate(self._id(os.fstat(fd)), 0))
            return fd

        def mkdir(path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
            wait()
            real["mkdir"](path, mode, dir_fd=dir_fd)
            self.calls.append(Create(*self._parent(path, dir_fd), self._new_id(os.stat(path, dir_fd=dir_fd)), True))

        def rename(src: Any, dst: Any, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None) -> None:
            wait()
            inode = self._id(os.stat(src, dir_fd=src_dir_fd))
            real["rename"](src, dst, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
            self.calls.append(Rename(*self._parent(src, src_dir_fd), *self._parent(dst, dst_dir_fd), inode))

        def link(
            src: Any, dst: Any, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None, **how: Any
        ) -> None:
            wait()
            real["link"](src, dst, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd, **how)
            inode = self._id(os.stat(dst, dir_fd=dst_dir_fd))
            self.calls.append(Link(*self._parent(dst, dst_dir_fd), inode))

        def remove(name: str) -> Callable[..., None]:
            def call(path: Any, *, dir_fd: int | None = None) -> None:
                wait()
                real[name](path, dir_fd=dir_fd)
                self.calls.append(Remove(*self._parent(path, dir_fd)))

            return call

        def ftruncate(fd: int, nbytes: int) -> None:
            wait()
            real["ftruncate"](fd, nbytes)
            self._note(fd, lambda inode: Truncate(inode, nbytes))

        def fsync(fd: int) -> None:
            wait()
            self._note(fd, Sync)

        def pwritev(fd: int, buffers: Any, offset: int) -> int:
            wait()
            count: int = real["pwritev"](fd, buffers, offset)
            data = b"".join(bytes(buffer) for buffer in buffers)[:count]
            self._note(fd, lambda inode: Write(inode, offset, data))
            return count

        def pwrite(fd: int, data: Any, offset: int) -> int:
            wait()
            count: int = real["pwrite"](fd, data, offset)
            written = bytes(data[:count])
            self._note(fd, lambda inode: Write(inode, offset, written))
            return count

        def exchange_(first: str, second: str) -> bool:
            wait()
            inodes = [self._id(os.stat(path)) for path in (first, second)]
            if not exchange(first, second):
                return False
            (parent, one), (_, other) = self._parent(first, None), self._parent(second, None)
            self.calls.append(Exchange(parent, (one, inodes[0]), (other, inodes[1])))
            return True

        with pytest.MonkeyPatch.context() as patch:
            for name, replacement in {
                "open": open_, "mkdir": mkdir, "rename": rename, "unlink": remove("unlink"), "rmdir": remove("rmdir"),
                "ftruncate": ftruncate, "fsync": fsync, "pwritev": pwritev, "pwrite": pwrite, "link": link,
            }.items():  # fmt: skip
                patch.setattr(os, name, replacement)
            patch.setattr(files, "exchange", exchange_)
            yield

    def _note(self, fd: int, call: Callable[[int], Call]) -> None:
        inode = self._ids.get(os.fstat(fd).st_ino)
        if inode in self._own:  # and not a slab in memory
            self.calls.append(call(inode))
