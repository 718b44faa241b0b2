"""What ranks and subprocesses of the tests of torch_checkpointing run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch_checkpointing import ItemSpec
from torch_checkpointing.checkpoint_writer import CallbackArgs
from torch_checkpointing.default_resharder import DefaultResharder

from stager.integrations.torch_checkpointing import (
    StagerCheckpointManager,
    StagerCheckpointStager,
    StagerStorageConfig,
)

WHOLE = torch.arange(48.0).reshape(8, 6)


def new_manager(**fields: Any) -> StagerCheckpointManager:
    """A manager that writes in the process that saves."""
    config = StagerCheckpointManager.Config.with_sync_save()
    for name, value in fields.items():
        setattr(config, name, value)
    return StagerCheckpointManager(config)


def note(args: CallbackArgs) -> None:
    """A callback that writes a file past the storage."""
    Path(args.path, "note.txt").write_bytes(b"mine")


def saved_and_loaded(rank: int, directory: str, out: str) -> str:
    """Save what differs from rank to rank, and load it. Returns the id of the run."""
    manager = new_manager()
    state = {"model": {"weight": WHOLE + rank}, "own": {"rank": rank}}
    manager.save(f"{out}/step-1", state)
    dist.barrier()
    loaded = manager.load(f"{out}/step-1", into={"model": {"weight": torch.zeros_like(WHOLE)}, "own": None})
    assert torch.equal(loaded["model"]["weight"], WHOLE + rank) and loaded["own"] == {"rank": rank}
    manager.close()
    return StagerStorageConfig().run()


def failed_and_saved(rank: int, directory: str, out: str) -> str:
    """A save fails on both ranks when all is written; the next one to that name has an item less. Returns the error."""
    failures = [OSError(28, "No space left on device")]

    def callback(args: CallbackArgs) -> None:
        dist.barrier()  # the other rank has written its part, too
        if failures:
            raise failures.pop()

    manager = new_manager(pre_finalize_callback=callback)
    found = ""
    try:
        manager.save(f"{out}/last", {"model": {"weight": WHOLE}, "ema": {"weight": WHOLE}})
    except OSError as error:
        found = type(error).__name__
    manager.save(f"{out}/last", {"model": {"weight": WHOLE + rank}})
    dist.barrier()
    loaded = manager.load(f"{out}/last", into={"model": None})
    assert torch.equal(loaded["model"]["weight"], WHOLE + rank)
    manager.close()
    return found


def loaded_as_shards(rank: int, directory: str, path: str) -> bool:
    """Load rows, then columns, of what one process saved."""
    mesh = init_device_mesh("cpu", (2,))
    manager = new_manager(items={"model": ItemSpec(resharder=DefaultResharder())})
    for placement in (Shard(0), Shard(1), Replicate()):
        target = distribute_tensor(torch.zeros_like(WHOLE), mesh, [placement])
        weight = manager.load(path, into={"model": {"weight": target}})["model"]["weight"]
        assert isinstance(weight, DTensor) and torch.equal(weight.full_tensor(), WHOLE)
    manager.close()
    return True


def main(out: str) -> None:
    """Save without waiting, change the state when it is staged, and load what was saved."""
    config = StagerCheckpointManager.Config(items={"frozen": ItemSpec(requires_copy=False, required=False)})
    config.save.process_config.subprocess_init_timeout_secs = 120  # on a busy machine, its 30 s may be too few
    manager = config.build()
    assert type(manager._saver.stager) is StagerCheckpointStager
    state: dict[str, Any] = {"model": {"weight": WHOLE.clone()}, "frozen": torch.ones(3)}
    manager.prewarm_staging(state)
    written = manager.save(f"{out}/step-3", state)
    with manager.lock():
        state["model"]["weight"].zero_()
    assert written is not None
    written.result(120)
    loaded = manager.load(f"{out}/step-3", into={"model": state["model"]})
    assert loaded["model"]["weight"] is state["model"]["weight"] and torch.equal(state["model"]["weight"], WHOLE)
    manager.close()


def new_async_manager() -> StagerCheckpointManager:
    """A manager whose subprocess may be slow to start, on a busy machine."""
    config = StagerCheckpointManager.Config.with_async_save()
    config.save.process_config.subprocess_init_timeout_secs = 120
    return StagerCheckpointManager(config)


def retry(out: str) -> None:
    """A save fails; each later one does, until there is a new manager."""
    manager = new_async_manager()
    manager.save(f"{out}/last", {"model": {"weight": torch.ones(3)}, "ema": {"weight": torch.ones(3)}})
    for call in (
        lambda: manager.save(f"{out}/last", {"model": {"weight": torch.full((3,), 2.0)}}),
        lambda: manager.save(f"{out}/other", {"model": {"weight": torch.full((3,), 2.0)}}),
        manager.close,
    ):
        try:
            call()
        except RuntimeError as error:
            assert "No space left on device" in str(error), error
        else:
            raise AssertionError("the error of the first save is not raised")
    manager = new_async_manager()
    manager.save(f"{out}/last", {"model": {"weight": torch.full((3,), 2.0)}})
    manager.close()


if __name__ == "__main__":
    if sys.argv[1] == "retry":
        retry(sys.argv[2])
    else:
        main(sys.argv[1])
