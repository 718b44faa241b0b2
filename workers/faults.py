"""Named points at which tests make things go wrong, in the real processes.

A point does nothing unless the environment variable ``STAGER_FAULTS`` names a directory. If that directory then holds a file
of the point's name, the first process to get there takes the file away and does what it says:

    kill | term | segv | stop      SIGKILL, SIGTERM, SIGSEGV, SIGSTOP to this process
    exit                           os._exit(3)
    errno NAME                     raise OSError(NAME), ENOSPC for example
    raise                          raise RuntimeError
    delay SECS                     go on after so many seconds: a slow disk
    hold PATH                      open the FIFO PATH.reached for writing, then PATH.go for reading: a test that opens the
                                   other ends knows that we are here, and decides when we go on

``after=N`` as a further word lets N visits of this process pass first. No sleeps, no timing: see ``tests/faults.py``.

Points of the trainer: ``save.planned save.overlapped save.filled save.copied save.handed-over withdraw.marked
withdraw.synced``;
of a worker's life: ``worker.start worker.import worker.ready task.receive task.run task.reply worker.shutdown``;
of its copies: ``copy.begin copy.piece copy.done``;
of a deep copy that it makes: ``stage.begin stage.unpacked stage.copied stage.packed``, and of writing it:
``persist.begin persist.written persist.synced persist.renamed``;
of its work: ``part.begin part.opened part.waiting part.write part.written part.sync part.synced part.receipt commit.begin
commit.indexed commit.manifest commit.published commit.replaced link.begin link.linked``;
of an export: ``export.begin export.manifest export.opened export.written``;
of retention: ``prune.begin prune.verified prune.renamed prune.removing prune.removed``; of deleting: ``remove.begin``;
of an object store: ``objects.decided objects.marked objects.retracted``;
of the publisher of ``stager.integrations.deepspeed``: ``deepspeed.written deepspeed.collected deepspeed.aside
deepspeed.unnamed deepspeed.replaced deepspeed.published``;
of the last export of ``stager.integrations.torchtitan``: ``hf_export.written hf_export.between hf_export.named``.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections import Counter

_DIRECTORY = os.environ.get("STAGER_FAULTS")
_visits: Counter[str] = Counter()


def point(name: str) -> None:
    """Called at a named point."""
    if _DIRECTORY is not None:
        _visit(_DIRECTORY, name)


def _visit(directory: str, name: str) -> None:
    path = os.path.join(directory, name)
    try:
        with open(path) as file:
            action, *words = file.read().split()
    except FileNotFoundError:
        return
    _visits[name] += 1
    if _visits[name] <= sum(int(w.removeprefix("after=")) for w in words if w.startswith("after=")):
        return
    try:
        os.unlink(path)  # whoever removes it acts: once, whichever process comes first
    except FileNotFoundError:
        return
    _act(action, words)


def _act(action: str, words: list[str]) -> None:
    signals = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "segv": signal.SIGSEGV, "stop": signal.SIGSTOP}
    if action in signals:
        os.kill(os.getpid(), signals[action])
    elif action == "exit":
        os._exit(3)
    elif action == "errno":
        code: int = getattr(errno, words[0])
        raise OSError(code, os.strerror(code))
    elif action == "raise":
        raise RuntimeError("raised by a test")
    elif action == "delay":
        time.sleep(float(words[0]))
    elif action == "hold":
        with open(f"{words[0]}.reached", "w"):
            pass
        with open(f"{words[0]}.go"):
            pass
    else:
        raise ValueError(f"unknown fault {action!r}")
