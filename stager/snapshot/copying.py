"""Copying a planned snapshot into its slab: by bytes, on all cores the trainer may use, without the GIL.

In ``save()`` the copy has the trainer's priority and all its threads, because the trainer waits. Guarded tensors are copied
in the background, by fewer threads of a lower priority, so that forward and backward keep their cores; and by the kernel,
because the program may free their memory meanwhile. When the trainer comes to wait for that, before the next step, it gets
all threads at the trainer's priority: on a busy host the others may not run for seconds.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial

import numpy as np
import torch

from stager.snapshot.batches import PIECE_BYTES, Batches, Gather, Move
from stager.snapshot.copy_threads import CopyThreads
from stager.snapshot.device_copies import bytes_of, copy_by_torch, enqueue
from stager.snapshot.kernel_copies import Scratch, read_into, vectors, write
from stager.state.bits import bits_of
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
        self._threads = CopyThreads(max(1, num_threads), max(1, num_background_threads))

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
        try:
            if on_streams:
                enqueue(on_streams, leaves, slab, streams)

            def do_and_tell(work: Move | Gather) -> None:
                if background:
                    _do_guarded(work, slab, cold, shares=self._threads.several_in_background)
                else:
                    _do(work, slab, cold)
                wrote(work.slab_offset, work.nbytes)

            calls = [partial(do_and_tell, work) for work in batches.on_host]
            run = self._threads.run_in_background if background else self._threads.run
            run(calls)
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

    def hurried(self) -> AbstractContextManager[None]:
        """While it is entered, the trainer waits: copies in the background get the trainer's threads and priority, too."""
        return self._threads.hurried()

    def close(self) -> None:
        """End the threads."""
        self._threads.close()


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
    source = bits_of(source) if copy.is_packed else bytes_of(source, copy)
    staged = torch.empty(0, dtype=torch.uint8).set_(slab.storage, copy.slab_offset, (copy.nbytes,))  # type: ignore[call-overload]  # torch's stubs lack this form
    return torch.equal(source.cpu().view(-1), staged)


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
