"""The interpreter shuts down while a snapshot is taken, or before it is: no thread can be started any more."""

from __future__ import annotations

import concurrent.futures.thread
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stager import Checkpointer
from tests.faults import Faults


def test_guarded_snapshot_is_finished_while_the_interpreter_shuts_down(
    run_dir: Path, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = torch.nn.Linear(300, 300)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    hold = faults.hold("save.overlapped")
    with Checkpointer(run_dir) as ckpt:
        ckpt.guard(optimizer)
        handle = ckpt.save(1, {"net": net})
        hold.wait()
        with monkeypatch.context() as patch:
            patch.setattr(concurrent.futures.thread, "_shutdown", True)  # what the interpreter does first
            hold.release()
            assert handle.upload_completion.result().step == 1
            late = ckpt.save(2, {"net": net})  # by an atexit handler, say
            assert late.staging_completion.done()
            assert late.upload_completion.result().step == 2
        assert ckpt.save(3, {"net": net}).upload_completion.result().step == 3  # not taken for a callback's


_PRINT_HANDLERS = """
import atexit
register, owners = atexit.register, []
atexit.register = lambda call, *args: (owners.append(call.__module__), register(call, *args))[1]
import stager.saving.at_exit
print(*(owner for owner in owners if owner.startswith("stager.")))
"""


def test_open_checkpointers_are_closed_before_the_pool() -> None:
    """``atexit`` runs first what was registered last: a pool that is closed first would lose the last save."""
    printed = subprocess.run([sys.executable, "-c", _PRINT_HANDLERS], check=True, capture_output=True, text=True).stdout
    assert printed.split() == ["stager.workers.pool.pool", "stager.saving.at_exit"]
