"""Loads a checkpoint with stock PyTorch alone and writes what it loaded with ``torch.save``.

The demo runs this file's source with ``python -c`` from an empty directory, so nothing of stager is imported, and the
script says so itself: it ends with an error if it were.  Arguments: the checkpoint's directory, a state of the same
structure that ``torch.save`` wrote, the file to write.  Prints the seconds that loading took.
"""

import sys
import time
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict_loader import load


def blank(value: Any) -> Any:
    """Return the same structure with every tensor and number overwritten: what is right in it later was loaded."""
    if isinstance(value, torch.Tensor):
        return torch.full_like(value, 77)
    if isinstance(value, Mapping):
        return {key: blank(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(blank(item) for item in value)
    return type(value)(77) if type(value) in (int, float) else value


def main(checkpoint: str, structure: str, loaded: str) -> None:
    """Load, and write what was loaded."""
    # With no process group dcp.load says that it assumes a single process; here that is meant.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
    expected = torch.load(structure, weights_only=True)
    state = blank({name: expected[name] for name in ("model", "optimizer")})
    started = time.perf_counter()
    load(state, checkpoint_id=checkpoint)
    print(time.perf_counter() - started)
    assert "stager" not in sys.modules
    assert "workers" not in sys.modules
    torch.save(state, loaded)


if __name__ == "__main__":
    main(*sys.argv[1:])
