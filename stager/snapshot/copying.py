"""Copying a planned snapshot into its slab: by bytes, on all cores the trainer may use, without the GIL.

In ``save()`` the copy has the trainer's priority and all its threads, because the trainer waits. Guarded tensors are copied
in the background, by fewer threads of a lower priority, so that forward and backward keep their cores; and by the kernel,
because the program may free their memory meanwhile.
"""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import torch

from stager.config.host import lower_priority
from stager.snapshot.batches import PIECE_BYTES, Batches, Gather, Move
from stager.snapshot.device_copies import bytes_of, copy_by_torch, enqueue
from stager.snapshot.kernel_copies import Scratch, read_into, vectors, write
from stager.state.copies import Copy
from stager.workers.device.streams import NO_STREAMS, SideStreams
from stager.workers.errors import InternalError, TornSnapshotError
from stager.workers.memory.slab import Slab
from stager.workers.wording import first_of

MOST_NAMES = 5  # in a message

_libc = ctypes.CDLL(None, use_errno=True)
_libc.memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


Wrote = Callable[[int, int], None]
"""Told of a range of a slab that is there: its offset, and the number of bytes."""


def tell_nobody(offset: int, nbytes: int) -> None:
    """Do nothing: nobody reads the slab before all of it is there."""


class Copier:
    """Copies batches with ``num_threads`` threads (the caller's included).

    Args:
        num_threads: while the trainer waits.
        num_background_threads: while training goes on.
    """

    def __init__(self, num_threads: int, num_background_threads: int = 1) -> None:
        self._foreground = _Threads(max(1, num_threads), is_background=False)
        self._background = _Threads(max(1, num_background_threads), is_background=True)

    def copy(
        self,
        batches: Batches,
        leaves: Sequence[torch.Tensor],
        slab: Slab,
        streams: SideStreams = NO_STREAMS,
        *,
        cold: bool = False,
        background: bool = False,
        wrote: Wrote = tell_nobody,
    ) -> None:
        """Copy; returns when every byte is in the slab.

        Args:
            leaves: the tensors that ``Copy.leaf`` numbers.
            streams: copy from devices; made in the trainer's thread.
            cold: the slab's pages may not be allocated yet: allocate those of a large copy right before it is written.
            background: the trainer does not wait.
            wrote: told of each range of the slab that is there, from any thread.

        Raises:
            MemoryGoneError: memory of a tensor was freed meanwhile.
        """
        on_streams = [copy for copy in batches.others if not copy.on_host] if streams else []
        threads = self._background if background else self._foreground
        try:
            if on_streams:
                enqueue(on_streams, leaves, slab, streams)
            do = partial(_do_guarded, shares=threads.count > 1) if background else _do

            def do_and_tell(work: Move | Gather) -> None:
                do(work, slab, cold)
                wrote(work.slab_offset, work.nbytes)

            threads.run([partial(do_and_tell, work) for work in batches.on_host])
            with torch.no_grad():
                for copy in batches.others:
                    if copy.on_host or not streams:
                        copy_by_torch(copy, leaves, slab)
                        wrote(copy.slab_offset, copy.nbytes)
        finally:
            if on_streams:
                streams.synchronize()  # also after an error: the slab is used for something else then
        for copy in on_streams:
            wrote(copy.slab_offset, copy.nbytes)

    def close(self) -> None:
        """End the threads."""
        self._foreground.close()
        self._background.close()


class _Threads:
    """Runs calls on the calling thread and some more, started when first needed."""

    def __init__(self, count: int, *, is_background: bool) -> None:
        self.count = count
        self._is_background = is_background
        self._executor: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    def run(self, calls: Sequence[Callable[[], None]]) -> None:
        iterator = iter(calls)  # shared: next() on an iterator over a list is atomic, so each call is taken once

        def work() -> None:
            try:
                for call in iterator:
                    call()
            except BaseException:
                deque(iterator, maxlen=0)  # drop the calls that no thread has begun
                raise

        helpers = min(self.count, len(calls)) - (
            0 if self._is_background else 1
        )  # the caller's thread keeps its priority
        gate = _Gate()
        futures: list[Future[None]] = []
        try:
            with suppress(RuntimeError):  # the interpreter is shutting down: no thread can be asked any more
                for _ in range(helpers):
                    futures.append(self._threads().submit(gate.run, work))
            if not self._is_background or not futures:
                work()
        except BaseException:
            deque(iterator, maxlen=0)
            raise
        finally:
            try:
                wait_uninterrupted(futures)  # they write into the slab
            finally:
                gate.close()  # so may a thread whose Future Ctrl-C has kept from the list
        for future in futures:
            future.result()

    def _threads(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._executor is None:
                initializer = lower_priority if self._is_background else None
                self._executor = ThreadPoolExecutor(
                    self.count, thread_name_prefix="stager-copy", initializer=initializer
                )
            return self._executor

    def close(self) -> None:
        with self._lock:
            executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown()


class _Gate:
    """Lets threads in until it is closed; who closes it waits until all are out."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._is_open = True
        self._num_inside = 0

    def run(self, work: Callable[[], None]) -> None:
        with self._changed:
            if not self._is_open:
                return
            self._num_inside += 1
        try:
            work()
        finally:
            with self._changed:
                self._num_inside -= 1
                self._changed.notify_all()

    def close(self) -> None:
        """Let nobody in any more. Raises KeyboardInterrupt, when all are out, if Ctrl-C was pressed meanwhile."""
        interrupted: KeyboardInterrupt | None = None
        while True:
            try:
                with self._changed:
                    self._is_open = False
                    self._changed.wait_for(lambda: not self._num_inside)
                break
            except KeyboardInterrupt as error:
                interrupted = error
        if interrupted is not None:
            raise interrupted


def wait_uninterrupted(futures: Sequence[Future[Any]]) -> None:
    """Wait until all are done, even after Ctrl-C: they use memory that is used for something else afterwards.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed meanwhile; all are done then.
    """
    interrupted: KeyboardInterrupt | None = None
    while True:
        try:
            wait(futures)
            break
        except KeyboardInterrupt as error:
            interrupted = error
    if interrupted is not None:
        raise interrupted


def _do(work: Move | Gather, slab: Slab, cold: bool) -> None:
    """Copy one stretch, or gather many small ones.

    Args:
        cold: the slab's pages may not be allocated yet.
    """
    _check_inside(work, slab)
    if isinstance(work, Gather):
        write(slab.fd, work.vectors, work.slab_offset)
        return
    if cold:
        slab.populate(work.slab_offset, work.nbytes)
    ctypes.memmove(slab.address + work.slab_offset, work.address, work.nbytes)


def _do_guarded(work: Move | Gather, slab: Slab, cold: bool, *, shares: bool) -> None:
    """Do as :func:`_do`, while the memory that is copied may be freed. See ``kernel_copies.py``.

    Args:
        shares: other threads copy at the same time.

    Raises:
        MemoryGoneError: it was freed.
    """
    if isinstance(work, Gather):  # the kernel copies it in either case
        _do(work, slab, cold)
        return
    _check_inside(work, slab)
    done = 0
    if shares and not cold:  # a page of the slab that cannot be allocated is EFAULT, too
        done = read_into(slab.address + work.slab_offset, work.address, work.nbytes)
    if done < work.nbytes:
        write(slab.fd, vectors([(work.address + done, work.nbytes - done)]), work.slab_offset + done)


def _check_inside(work: Move | Gather, slab: Slab) -> None:
    if work.slab_offset < 0 or work.slab_offset + work.nbytes > slab.nbytes:
        raise InternalError(
            f"a copy of {work.nbytes} bytes to offset {work.slab_offset} is outside of slab {slab.slab_id}, which has "
            f"{slab.nbytes} bytes"
        )


def compare(
    copies: Sequence[Copy], leaves: Sequence[torch.Tensor], slab: Slab, name: Callable[[int], str], *, may_go: bool
) -> None:
    """Compare the snapshot with its sources, byte for byte (``staging.verify``).

    Args:
        may_go: the sources may be freed meanwhile.

    Raises:
        TornSnapshotError: naming the tensors that changed.
        MemoryGoneError: memory of a tensor was freed meanwhile.
    """
    by_address = [copy for copy in copies if copy.on_host and not copy.is_packed]
    others = [copy for copy in copies if not copy.on_host or copy.is_packed]
    differing = [*_differing(by_address, slab, may_go), *(copy for copy in others if not _is_same(copy, leaves, slab))]
    if differing:
        torn = [name(leaf) for copy in differing for leaf in copy.leaves]
        raise TornSnapshotError(
            f"{first_of(torn, MOST_NAMES)} changed while the snapshot was taken: another thread, or a step that was not "
            "guarded, wrote to the state during save(); write to it after save() has returned. Nothing of this save is "
            "committed"
        )


def _is_same(copy: Copy, leaves: Sequence[torch.Tensor], slab: Slab) -> bool:
    """Compare by torch."""
    source = leaves[copy.leaf].detach()
    source = source.resolve_conj().resolve_neg().contiguous() if copy.is_packed else bytes_of(source, copy)
    staged = torch.empty(0, dtype=torch.uint8).set_(slab.storage, copy.slab_offset, (copy.nbytes,))  # type: ignore[call-overload]  # torch's stubs lack this form
    return torch.equal(source.cpu().view(-1).view(torch.uint8), staged)


def _differing(copies: Sequence[Copy], slab: Slab, may_go: bool) -> Iterator[Copy]:
    """Compare by address."""
    if not may_go:
        yield from (c for c in copies if _libc.memcmp(c.address, slab.address + c.slab_offset, c.nbytes))
        return
    with Scratch() as scratch:
        for stretches in _read_at_once(copies):
            data = scratch.read(vectors([(copy.address + start, nbytes) for copy, start, nbytes in stretches]))
            here = np.frombuffer(data, dtype=np.uint8).ctypes.data
            for copy, start, nbytes in stretches:
                if _libc.memcmp(here, slab.address + copy.slab_offset + start, nbytes):
                    yield copy
                here += nbytes


def _read_at_once(copies: Sequence[Copy]) -> Iterator[list[tuple[Copy, int, int]]]:
    """Group stretches (copy, start, nbytes) of 16 MiB at most into groups of hardly more."""
    group: list[tuple[Copy, int, int]] = []
    total = 0
    for copy in copies:
        for start in range(0, copy.nbytes, PIECE_BYTES):
            nbytes = min(PIECE_BYTES, copy.nbytes - start)
            if group and total + nbytes > PIECE_BYTES:
                yield group
                group, total = [], 0
            group.append((copy, start, nbytes))
            total += nbytes
    if group:
        yield group
