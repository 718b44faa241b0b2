"""Memory that is not there, not ours, or shared, and storages themselves."""

from __future__ import annotations

import mmap
import os
import tempfile
import warnings
from typing import Any

import numpy as np
import torch

from tests.states.corpus.registry import Expect, state, values
from tests.states.corpus.tensors import rand


def _resized(tensor: torch.Tensor, nbytes: int) -> torch.Tensor:
    tensor.untyped_storage().resize_(nbytes)
    return tensor


def _freed_parameter() -> torch.Tensor:
    return torch.nn.Parameter(_resized(torch.ones(1000), 0))


def _freed_view() -> torch.Tensor:
    base = torch.ones(1000, 10)
    view = base[500:]
    _resized(base, 100)
    return view


def _one_freed() -> list[torch.Tensor]:
    return [torch.ones(3), _resized(torch.ones(1000), 0), torch.ones(5)]


def _freed_quantized() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _resized(torch.quantize_per_tensor(torch.ones(100), 0.1, 0, torch.qint8), 0)


values(
    "freed storages",
    {
        "freed": lambda: _resized(torch.ones(1000), 0),
        "freed-large": lambda: _resized(torch.ones(4 << 20), 0),
        "freed-parameter": _freed_parameter,
        "freed-view": _freed_view,
        "freed-column": lambda: _resized(torch.ones(100, 100)[:, 3], 0),
        "freed-bfloat16": lambda: _resized(torch.ones(1000, dtype=torch.bfloat16), 0),
        "freed-in-list": _one_freed,
        "freed-in-tuple": lambda: (1, _resized(torch.ones(1000), 0)),
        "freed-conj": lambda: _resized(torch.ones(1000, dtype=torch.complex64), 0).conj(),
        "freed-quantized": _freed_quantized,
        "freed-sparse-values": lambda: torch.sparse_coo_tensor(
            [[0, 1]], _resized(torch.ones(2), 0), (3,), check_invariants=False
        ),
        "shrunk": lambda: _resized(torch.ones(4 << 20), 4096),
        "shrunk-by-one-byte": lambda: _resized(torch.ones(1024), 4095),
        "shrunk-transposed": lambda: _resized(torch.ones(64, 64).t(), 4096),
    },
    expect=Expect.REFUSED,
    is_dangerous=True,
)


def _from_memory_map() -> torch.Tensor:
    with tempfile.TemporaryFile() as file:
        file.write(bytes(range(256)) * 16)
        file.flush()
        mapped = mmap.mmap(file.fileno(), 4096)
    return torch.frombuffer(mapped, dtype=torch.uint8)


def _from_file() -> torch.Tensor:
    with tempfile.NamedTemporaryFile() as file:
        os.truncate(file.name, 4096)
        return torch.from_file(file.name, shared=True, size=1024, dtype=torch.float32).fill_(3)


def _shared() -> torch.Tensor:
    return rand(1000).share_memory_()


def _read_only_array() -> torch.Tensor:
    array = np.arange(5.0)
    array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that it cannot keep the array read-only
        return torch.from_numpy(array)


values(
    "whose memory",
    {
        "shared-memory": _shared,
        "from-numpy": lambda: torch.from_numpy(np.arange(12.0).reshape(3, 4)[::-1].copy()),
        "from-numpy-read-only": _read_only_array,
        "from-numpy-unaligned": lambda: torch.frombuffer(bytearray(range(17)), dtype=torch.uint8, offset=1),
        "from-memory-map": _from_memory_map,
        "from-file": _from_file,
        "grown-storage": lambda: _resized(torch.arange(10.0), 4096),
        "freed-but-empty": lambda: _resized(torch.empty(0, 5), 0),
        "small-view-of-large": lambda: rand(1 << 20)[5:8],
    },
)

values(
    "storages as values",
    {
        "untyped-storage": lambda: rand(4).untyped_storage(),
        "untyped-storage-in-tuple": lambda: (1, rand(4).untyped_storage()),
    },
)


@state("typed-storage", "storages as values")
def _typed() -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {"x": rand(4).storage()}
