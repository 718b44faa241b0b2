"""A DataLoader's workers are forked from the trainer while saves are in flight: they disturb nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from stager import Checkpointer, ClosedError, DirectoryInUseError
from stager.workers.checkpoint.read.verify import verify_checkpoint
from tests.faults import Faults


class SavesInTheChild(Dataset[int]):
    """Each item tries to use the Checkpointer that it has inherited; 1: it was told that this is not its own."""

    def __init__(self, ckpt: Checkpointer) -> None:
        self.ckpt, self.owner = ckpt, os.getpid()

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        try:
            self.ckpt.save(index, {"x": torch.ones(1)})
        except ClosedError as error:
            self.ckpt.close()  # does nothing here
            return int("forked child" in str(error) and os.getpid() != self.owner)
        return 0


@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")  # Python 3.12 and later, with threads
def test_dataloader_workers_while_a_save_is_in_flight(run_dir: Path, faults: Faults) -> None:
    """1. a save is held in the middle; 2. loaders are forked, use what they inherited, end; 3. the save goes on; 4. the lock
    of the directory is still held, and another save works."""
    with Checkpointer(run_dir, {"workers": {"count": 1}}) as ckpt:
        hold = faults.hold("part.write")
        handle = ckpt.save(1, {"x": torch.arange(1000)})
        hold.wait()
        loader = DataLoader(SavesInTheChild(ckpt), num_workers=2, batch_size=2, multiprocessing_context="fork")
        assert [batch.tolist() for batch in loader] == [[1, 1]] * 4
        hold.release()
        assert verify_checkpoint(handle.upload_completion.result().path).ok
        with pytest.raises(DirectoryInUseError):
            Checkpointer(run_dir, {"persistence": {"lock_timeout_secs": 0}})
        assert ckpt.save(2, {"x": torch.arange(1000)}).upload_completion.result().step == 2
        assert [info.step for info in ckpt.checkpoints()] == [1, 2]


@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_child_that_outlives_the_checkpointer_holds_nothing_of_it(run_dir: Path) -> None:
    """Neither the lock, nor the workers' sockets: a persistent loader lives longer than a run's Checkpointer."""
    done_read, done_write = os.pipe()
    ckpt = Checkpointer(run_dir, {"workers": {"count": 1}})
    ckpt.save(1, {"x": torch.arange(1000)}).upload_completion.result()
    pid = os.fork()
    if pid == 0:
        os.close(done_write)
        os.read(done_read, 1)  # until the parent has closed its end
        os._exit(0)
    try:
        ckpt.close()
        with Checkpointer(run_dir, {"workers": {"count": 1}, "persistence": {"lock_timeout_secs": 0}}) as again:
            assert [info.step for info in again.checkpoints()] == [1]
    finally:
        os.close(done_write)
        os.close(done_read)
        os.waitpid(pid, 0)


@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")  # Python 3.12 and later, with threads
def test_a_child_that_is_forked_in_the_middle_of_a_copy_loads_into_its_own_state(run_dir: Path, faults: Faults) -> None:
    """1. a guarded copy is held 2. the child, where nobody ends it, loads 3. the copy goes on."""
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters())
    with Checkpointer(run_dir, {"workers": {"count": 1}}) as ckpt:
        ckpt.save(1, {"model": model}).upload_completion.result()
        ckpt.guard(optimizer)
        with faults.hold("save.copied") as hold:
            ckpt.save(2, {"model": model})
            hold.wait()
            pid = os.fork()
            if not pid:
                loaded = ckpt.load(1, into={"model": model})
                os._exit(0 if loaded is not None and loaded.step == 1 else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
            hold.release()
