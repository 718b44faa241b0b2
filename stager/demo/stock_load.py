"""Loads a checkpoint with stock PyTorch alone and compares it with a file that ``torch.save`` wrote.

The demo runs this file's source with ``python -c`` from an empty directory, so nothing of stager is imported, and the
script says so itself: it ends with an error if it were.  Arguments: the checkpoint's directory, the other file.
Prints one JSON object.
"""

import json
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict_loader import load


def blank(value: Any) -> Any:
    """The same structure with every tensor and number overwritten: what is right in it afterwards was loaded."""
    if isinstance(value, torch.Tensor):
        return torch.full_like(value, 77)
    if isinstance(value, Mapping):
        return {key: blank(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(blank(item) for item in value)
    return type(value)(77) if type(value) in (int, float) else value


def leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every tensor and plain value, and where it is."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(item, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from leaves(item, f"{path}.{index}")
    else:
        yield path, value


def same(one: Any, other: Any) -> bool:
    """Tensors are compared by their bytes, anything else with its type."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and bits(one) == bits(other)
    return type(one) is type(other) and bool(one == other)


def bits(tensor: torch.Tensor) -> bytes:
    """The bytes of the elements, in order."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def main(checkpoint: str, expected_path: str) -> None:
    """Load, compare, print."""
    # With no process group dcp.load says that it assumes a single process; here that is meant.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
    state = torch.load(expected_path, weights_only=True)
    expected = {name: state[name] for name in ("model", "optimizer")}
    loaded = blank(expected)
    started = time.perf_counter()
    load(loaded, checkpoint_id=checkpoint)
    secs = time.perf_counter() - started

    pairs = list(zip(leaves(expected, "state"), leaves(loaded, "state"), strict=True))
    differences = [path for (path, one), (_, other) in pairs if not same(one, other)]
    tensors = [one for (_, one), _ in pairs if isinstance(one, torch.Tensor)]
    assert "stager" not in sys.modules
    assert "workers" not in sys.modules
    result = {
        "num_tensors": len(tensors),
        "nbytes": sum(tensor.nbytes for tensor in tensors),
        "secs": secs,
        "differences": differences,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
