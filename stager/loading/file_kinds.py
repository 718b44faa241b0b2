"""Files that are no checkpoint, told by their first bytes: what each seems to be, and what to do with it."""

from __future__ import annotations

import os
import zipfile

from stager.loading.pickles.legacy import is_legacy
from stager.workers.checkpoint.storage.posix.files import open_regular, storage_errors
from stager.workers.errors import CorruptCheckpointError, UsageError

_HEAD_BYTES = 512
_ZIP = b"PK\x03\x04"
_USTAR, _USTAR_AT = b"ustar", 257
_LARGEST_HEADER_BYTES = 100_000_000  # of safetensors
_LENGTH_BYTES = 8
_SHOWN_NAMES = 3

_BEGINNINGS: tuple[tuple[bytes, str], ...] = (
    (b"\x89HDF\r\n\x1a\n", "is an HDF5 file (of Keras, for example); read it with h5py"),
    (b"\x93NUMPY", "is an array of NumPy; read it with numpy.load()"),
    (b"GGUF", "is a GGUF file of llama.cpp, which stager does not read; load the weights that it was made from"),
    (b"\x1f\x8b", "is compressed by gzip; decompress it first (gunzip)"),
    (b"\x28\xb5\x2f\xfd", "is compressed by Zstandard; decompress it first (unzstd)"),
    (b"BZh", "is compressed by bzip2; decompress it first (bunzip2)"),
    (b"\xfd7zXZ\0", "is compressed by xz; decompress it first (unxz)"),
    (
        b"version https://git-lfs",
        "is a pointer of Git LFS, not the file itself; run `git lfs pull` where it was cloned",
    ),
    (b"<!doctype", "is a web page: the download failed, or needs a login; download the file again"),
    (b"<html", "is a web page: the download failed, or needs a login; download the file again"),
)


def refuse_other_kinds(path: str) -> None:
    """Raise unless the file begins as a file of ``torch.save``, of any version, does.

    Raises:
        UsageError: it is of another kind; says which, and what reads it.
        CorruptCheckpointError: it is empty, cut short, or of no kind that is known.
        StorageError
    """
    with storage_errors("read", path), open(open_regular(path), "rb") as file:
        head, nbytes = file.read(_HEAD_BYTES), os.fstat(file.fileno()).st_size
        if is_legacy(head):
            return
        if head.startswith(_ZIP):
            _refuse_other_archives(file.fileno(), path)
            return
    for beginning, what in _BEGINNINGS:
        if head[: len(beginning)].lower() == beginning.lower():
            raise UsageError(f"{path} {what}")
    if head[_USTAR_AT:].startswith(_USTAR):
        raise UsageError(
            f"{path} is a tar archive. If torch.save wrote it before torch 0.2, and you trust its origin, load it by "
            "torch.load(path, weights_only=False), and save it again; any other has to be unpacked"
        )
    if head[:1] == b"\x80" and head[1:2] <= b"\x05":
        raise UsageError(
            f"{path} is a Python pickle, and torch.save did not write it. If you trust its origin, load it by the library "
            "that wrote it (pickle, joblib), and save it by torch.save"
        )
    if head.lstrip()[:1] in (b"{", b"[") and not _begins_as_safetensors(head):
        raise UsageError(f"{path} is JSON, and holds no tensors; name the file or directory of the weights")
    raise CorruptCheckpointError(path, _nothing_known(head, nbytes))


def _nothing_known(head: bytes, nbytes: int) -> str:
    if not head:
        return (
            "is empty: its writer was stopped before it wrote anything, or the disk was full; load another checkpoint"
        )
    if not any(head):
        return "begins with zeros only: the host stopped before the data was on disk; load another checkpoint"
    if _begins_as_safetensors(head):
        length = int.from_bytes(head[:_LENGTH_BYTES], "little")
        return (
            f"seems to be a safetensors file that is cut short: its header alone needs {_LENGTH_BYTES + length} bytes, and "
            f"the file has only {nbytes}; copy it again, or load another checkpoint"
        )
    return (
        "is not what torch.save writes, nor safetensors, nor anything else that stager knows; it begins with "
        f"{head[:12]!r}. Give a file that torch.save or safetensors wrote, or the directory of a checkpoint"
    )


def _begins_as_safetensors(head: bytes) -> bool:
    length = int.from_bytes(head[:_LENGTH_BYTES], "little")
    return head[_LENGTH_BYTES:].startswith(b"{") and length <= _LARGEST_HEADER_BYTES


def _refuse_other_archives(fd: int, path: str) -> None:
    """Refuse a zip archive that torch.save did not write."""
    try:
        with zipfile.ZipFile(f"/proc/self/fd/{fd}") as archive:
            names = archive.namelist()
    except Exception as error:  # a damaged archive can make zipfile raise anything
        raise CorruptCheckpointError(
            path,
            f"is a file of torch.save, or another zip archive, whose end is missing or damaged ({os.fstat(fd).st_size} "
            f"bytes are there; {error}); copy it again, or load another checkpoint",
        ) from error
    records = {one.rpartition("/")[2] for one in names}
    if "constants.pkl" in records:
        raise UsageError(
            f"{path} is a TorchScript archive, of torch.jit.save. Load it by torch.jit.load(path); "
            "torch.jit.load(path).state_dict() is its state, which torch.save and stager can save"
        )
    if records & {"archive_format", "serialized_exported_program.json"}:
        raise UsageError(
            f"{path} is an exported program, of torch.export.save. Load it by torch.export.load(path); "
            "torch.export.load(path).state_dict is its state, which torch.save and stager can save"
        )
    if names and all(one.endswith(".npy") for one in names):
        raise UsageError(f"{path} holds arrays of NumPy (numpy.savez); read it with numpy.load()")
    if "data.pkl" not in records:
        shown = ", ".join(names[:_SHOWN_NAMES]) or "nothing"
        raise UsageError(f"{path} is a zip archive that torch.save did not write (in it: {shown}); unpack it first")
