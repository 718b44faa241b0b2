"""A forked child has the parent's mappings, and nothing to say about them."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable

from stager.arena.arena import Arena
from stager.workers.errors import ClosedError
from tests.arena.conftest import MIB, take

Make = Callable[..., Arena]


def in_child(work: Callable[[], bool]) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of fork in a process with threads
        pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if work() else 1)
        except BaseException as error:  # noqa: BLE001  (the edge of the process)
            sys.stderr.write(f"{error!r}\n")
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def refuses(call: Callable[[], object]) -> bool:
    try:
        call()
    except ClosedError as error:
        return "belongs to process" in str(error)
    return False


def test_child_can_take_nothing_and_free_nothing(make_arena: Make) -> None:
    arena = make_arena(buffers=2)
    lease = take(arena, MIB)
    free = take(arena, MIB)
    free.slab.prefault()
    free.release()

    def child() -> bool:
        lease.release()
        arena.close()
        calls = (
            lambda: arena.lease(MIB),
            lambda: arena.prepare(MIB),
            lambda: arena.prepare_in_background(MIB),
        )
        return all(map(refuses, calls))

    assert in_child(child)
    again = take(arena, MIB)
    assert again.warm
    assert again.slab.allocated_nbytes == MIB
    assert arena.nbytes == 2 * MIB


def test_child_forked_while_the_lock_is_held_does_not_wait_for_it(make_arena: Make) -> None:
    arena = make_arena(buffers=2)
    lease = take(arena, MIB)

    def child() -> bool:
        lease.release()
        arena.close()
        return refuses(lambda: arena.lease(MIB))

    with arena._changed:
        assert in_child(child)
    lease.release()


def test_memory_is_freed_while_a_forked_child_lives(make_arena: Make) -> None:
    arena = make_arena(buffers=1)
    lease = take(arena, 4 * MIB)
    lease.slab.prefault()
    slab = lease.slab
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(writing)
        os.read(reading, 1)  # until the parent closes its end
        os._exit(0)
    os.close(reading)
    try:
        lease.release()
        arena.close()
        assert slab.allocated_nbytes == 0
    finally:
        os.close(writing)
        os.waitpid(pid, 0)
