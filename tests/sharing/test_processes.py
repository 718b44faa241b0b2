"""Beside other processes: forked children, storages that are shared by name, a trainer that is killed."""

from __future__ import annotations

import signal

from tests import scripts
from tests.faults import Faults
from tests.observed import shm_names
from tests.pool import tasks

_SETUP = """
import os, signal, sys, threading, torch
from tests.sharing.snapshots import MIB, Snapshots, random_bytes
from stager.workers import ClosedError, WorkerPool
torch.set_num_threads(1)  # a forked child has none of OpenMP's threads
def started():
    pool = WorkerPool(count=1)
    pool.submit(os.getpid).result()
    return pool
"""


def test_forked_child_sees_the_trainers_updates_and_harms_nobody() -> None:
    """After the move parent and child have one memory, where copy-on-write gave the child its own."""
    done = scripts.run(
        _SETUP + "read, write = os.pipe()\n"
        "with started() as pool:\n"
        "    snapshots, state = Snapshots(pool), {'w': torch.zeros(MIB)}\n"
        "    snapshots.take(state)\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        os.read(read, 1)\n"
        "        assert state['w'].sum() == MIB\n"
        "        try:\n"
        "            snapshots.take(state)\n"
        "        except ClosedError as error:\n"
        "            assert 'forked child' in str(error)\n"
        "        else:\n"
        "            os._exit(1)\n"
        "        own = started()\n"
        "        assert Snapshots(own).take(state).for_workers == {'w'}\n"
        "        own.close()\n"
        "        del state, snapshots\n"
        "        os._exit(7)\n"
        "    state['w'].fill_(1)\n"
        "    os.write(write, b'.')\n"
        "    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7\n"
        "    taken = snapshots.take(state)\n"
        "    assert taken.equals_source() and taken.for_workers == {'w'}\n"
    )
    assert done.returncode == 0


def test_storage_that_is_shared_by_name_stays_with_those_who_share_it() -> None:
    """And one that somebody moves from our mapping to a named one is noticed."""
    done = scripts.run(
        _SETUP + "import torch.multiprocessing as mp\n"
        "mp.set_sharing_strategy('file_system')\n"
        "with started() as pool:\n"
        "    snapshots = Snapshots(pool)\n"
        "    named = torch.ones(MIB).share_memory_()\n"
        "    address = named.data_ptr()\n"
        "    state = {'named': named, 'moved': torch.ones(MIB)}\n"
        "    taken = snapshots.take(state)\n"
        "    assert taken.equals_source() and taken.for_workers == {'moved'}, taken\n"
        "    assert 'by name' in taken.notes[0] and named.data_ptr() == address\n"
        "    assert len(snapshots.sharer.live_sources()) == 1\n"
        "    state['moved'].untyped_storage()._share_filename_cpu_()\n"
        "    assert snapshots.sharer.live_sources() == set()\n"
        "    state['moved'].fill_(2)\n"
        "    taken = snapshots.take(state)\n"
        "    assert taken.equals_source() and taken.for_workers == set(), taken\n"
        "    assert taken.notes[0].startswith('2 large tensors')\n"
        "    assert snapshots.sharer.live_sources() == set()\n"
        "    del named, state\n"
    )
    assert done.returncode == 0


def test_trainer_killed_while_a_worker_copies_leaves_nothing(faults: Faults) -> None:
    """The worker is held in the middle of its copy; it ends by itself afterwards, and with it the memory."""
    hold = faults.hold("copy.piece")
    script = (
        "pool = started()\n"
        "print(*pool.pids, flush=True)\n"
        "state = {'w': random_bytes(40 * MIB)}\n"
        "Snapshots(pool).take(state)\n"
    )
    with scripts.running(_SETUP + script) as trainer:
        hold.wait()
        trainer.kill(signal.SIGKILL)
        assert trainer.wait() == -signal.SIGKILL
        hold.release()
        worker = int(trainer.stdout.read())
        tasks.wait_gone(worker)
    assert shm_names(trainer.pid, worker) == []
