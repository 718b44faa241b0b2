"""The pause of the garbage collector: shared by threads, ended in a forked child, and around what hangs without it."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading

import pytest

from stager.workers.gc_pause import no_collection

_LOOKS_WHILE_THREADS_COME_AND_GO = """
import gc, threading, time
from stager.snapshot.tripwires import wait_until_call_is_left

class Loop:  # garbage whose end lets another thread run
    def __init__(self):
        self.me = self
    def __del__(self):
        time.sleep(0.0001)

def come_and_go():
    while not done.is_set():
        thread = threading.Thread(target=lambda: None)
        thread.start()
        thread.join()

done = threading.Event()
other = threading.Thread(target=come_and_go)
other.start()
gc.set_threshold(1, 1, 1)
for _ in range(2000):
    Loop()
    wait_until_call_is_left(other.ident, 0.0)
done.set()
other.join()
"""


def pausing_thread() -> tuple[threading.Thread, threading.Event, threading.Event]:
    """A thread that is to be started; the event that it is in a pause; and the one that lets it leave."""
    entered, leave = threading.Event(), threading.Event()

    def pause() -> None:
        with no_collection():
            entered.set()
            leave.wait()

    return threading.Thread(target=pause), entered, leave


def test_a_look_at_another_thread_does_not_hang_when_a_collection_is_due() -> None:
    """It hangs with CPython 3.11.7 if the collection runs inside of the look."""
    subprocess.run([sys.executable, "-c", _LOOKS_WHILE_THREADS_COME_AND_GO], check=True, timeout=120)


def test_it_lasts_until_the_last_thread_leaves() -> None:
    thread, entered, leave = pausing_thread()
    with no_collection():
        thread.start()
        entered.wait()
    is_enabled = gc.isenabled()
    leave.set()
    thread.join()
    assert not is_enabled and gc.isenabled()


def test_who_had_it_off_keeps_it_off() -> None:
    gc.disable()
    try:
        with no_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")  # that is what this is about
def test_a_child_that_is_forked_in_another_threads_pause_collects() -> None:
    thread, entered, leave = pausing_thread()
    thread.start()
    entered.wait()
    try:
        pid = os.fork()
        if not pid:
            with no_collection():
                pass
            os._exit(0 if gc.isenabled() else 1)
    finally:
        leave.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
