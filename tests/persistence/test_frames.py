"""The bytes around a tensor: what torch.save writes, known ahead, the same in every process."""

from __future__ import annotations

import hashlib
import io
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from stager.workers.checkpoint.formats.torch_save import header_and_tail
from stager.workers.checkpoint.layout.dtypes import dtype_of

# Those that torch.save can write; int1 to uint7 it cannot, quantized tensors are saved as objects.
_DTYPES = [
    name
    for value in vars(torch).values()
    if isinstance(value, torch.dtype)
    and not (name := str(value).removeprefix("torch.")).startswith("q")
    and name not in {f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8)}
]
_SHAPES = [(), (0,), (1,), (7,), (3, 5), (4, 0, 3), (1, 1, 1), (1000,)]


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(max(1, n) for n in shape[i + 1 :]) for i in range(len(shape)))


@pytest.mark.parametrize("name", sorted(set(_DTYPES)))
def test_framed_bytes_are_a_tensor_to_torch_load(name: str) -> None:
    dtype = dtype_of(name)
    for shape in _SHAPES:
        stride = contiguous(shape)
        head, tail = header_and_tail(name, shape, stride)
        nbytes = math.prod(shape) * dtype.itemsize
        raw = bytes(nbytes) if name == "bool" else os.urandom(nbytes)
        assert not nbytes or len(head) % 64 == 0
        with warnings.catch_warnings():  # complex32 is "experimental"
            warnings.simplefilter("ignore")
            tensor = torch.load(io.BytesIO(head + raw + tail), weights_only=True)
        assert (tensor.dtype, tuple(tensor.shape), tensor.stride()) == (dtype, shape, stride)
        assert bytes(tensor.untyped_storage()) == raw


@pytest.mark.parametrize("shape, stride", [((3, 5), (1, 3)), ((2, 3, 4, 5), (60, 1, 15, 3)), ((1, 4), (77, 1))])
def test_dense_strides_are_kept(shape: tuple[int, ...], stride: tuple[int, ...]) -> None:
    head, tail = header_and_tail("float64", shape, stride)
    raw = os.urandom(math.prod(shape) * 8)
    tensor = torch.load(io.BytesIO(head + raw + tail), weights_only=True)
    assert tensor.stride() == stride and bytes(tensor.untyped_storage()) == raw


def test_tensor_of_more_than_4_gib_is_a_zip64_archive(tmp_path: Path) -> None:
    """Sparse: it takes neither memory nor disk."""
    count = (4 << 30) // 4 + 5
    head, tail = header_and_tail("int32", (count,), (1,))
    path = tmp_path / "blob"
    with open(path, "wb") as file:
        file.write(head)
        file.seek(4 * (count - 1), os.SEEK_CUR)
        file.write((12345).to_bytes(4, "little") + tail)
    tensor = torch.load(path, weights_only=True, mmap=True)
    assert tensor.shape == (count,) and int(tensor[-1]) == 12345 and int(tensor[0]) == 0


def digest() -> str:
    frames = [header_and_tail(name, (3, 4), (4, 1)) for name in ("float32", "bool", "complex64", "uint16")]
    return hashlib.sha256(b"".join(b"".join(frame) for frame in frames)).hexdigest()


def test_frames_are_the_same_in_every_process() -> None:
    program = "from tests.persistence.test_frames import digest; print(digest())"
    other = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert other.strip() == digest()


def test_what_the_user_set_for_torch_does_not_change_them() -> None:
    """The trainer computes sizes and the workers write bytes: settings of the trainer's process must not part them."""
    config = pytest.importorskip("torch.utils.serialization", reason="torch 2.7 has these settings").config
    expected = digest()
    header_and_tail.cache_clear()
    torch.use_deterministic_algorithms(True)
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float64)
    try:
        with config.patch("save.storage_alignment", 4096):
            assert digest() == expected
            assert config.save.storage_alignment == 4096
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device("cpu")
        torch.use_deterministic_algorithms(False)
        header_and_tail.cache_clear()


@pytest.mark.parametrize("name", ["float33", "nn", "_C", "onnx", "__path__", "", "qint8", "float", None, 3, []])
def test_only_names_of_dtypes_are_looked_up(name: object) -> None:
    with pytest.raises(ValueError, match="has no dtype"):
        dtype_of(name)
