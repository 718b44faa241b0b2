"""Threads and workers yield to the trainer, also to one that is niced itself: their niceness is relative to its own."""

from __future__ import annotations

import pytest

from tests import scripts

_PROGRAM = """
import logging, os, threading, torch
from stager.arena.arena import Arena
from stager.snapshot.copying import Copier
from stager.state.copies import Copy
from stager.workers.memory.slab import Slab
from stager.workers.pool.pool import PoolOptions, WorkerPool
from stager.snapshot.batches import batch

os.nice({nice})

def niceness(prefix):
    return [os.getpriority(os.PRIO_PROCESS, t.native_id) for t in threading.enumerate() if t.name.startswith(prefix)]

source = torch.ones(50 << 20, dtype=torch.uint8)
slab = Slab.create(source.nbytes)
copier = Copier(2, 1)
copier.copy(batch([Copy(0, source.data_ptr(), 0, source.nbytes, (0,))]), [source], slab, background=True)
print(*niceness("stager-copy"), end=" ")
copier.close()

warmed = []
def warm(buffer, go_on, num_threads):  # what the thread of the arena does
    warmed.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
    raise MemoryError
arena = Arena(2, 1 << 30, "wait")
arena._prefaulter._warm = warm
logging.getLogger("stager").disabled = True
arena.prepare_in_background(4096)
arena._prefaulter.join()
arena.close()
print(*warmed, end=" ")

with WorkerPool(count=1, options=PoolOptions(nice=10)) as pool:
    print(pool.submit(lambda: os.getpriority(os.PRIO_PROCESS, 0)).result(), end=" ")
print(os.getpriority(os.PRIO_PROCESS, 0))
"""


@pytest.mark.parametrize("nice", [0, 5, 15, 19])
def test_niceness_is_added_to_the_trainers(nice: int) -> None:
    ended = scripts.run(_PROGRAM.format(nice=nice))
    assert ended.returncode == 0
    *lowered, own = map(int, ended.stdout.split())
    assert own >= nice  # this suite may be niced, too
    assert lowered == [min(19, own + 10)] * 3


def test_background_io_stays_idle_where_the_trainers_is() -> None:
    program = """
import psutil
from stager.workers.pool.pool import PoolOptions, WorkerPool
psutil.Process().ionice(psutil.IOPRIO_CLASS_IDLE)
def look():
    import psutil
    return int(psutil.Process().ionice().ioclass)
with WorkerPool(count=1, options=PoolOptions(ionice="low")) as pool:
    print(pool.submit(look).result())
"""
    ended = scripts.run(program)
    assert (ended.returncode, ended.stdout.strip()) == (0, "3")
