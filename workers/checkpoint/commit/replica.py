"""The copy of a rank's snapshot that its partner keeps: the slab as it was, and beside it what a worker has to know to write
the rank's share of the checkpoint from it.

    rank-3.0        the slab's bytes
    rank-3.0.json   the header, sealed; there only while the bytes are whole

A replica becomes part of a checkpoint as a snapshot does: by ``persist_part``, which leaves the same files and receipts as
the rank itself would have left.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from typing import Any

import xxhash

from stager.workers.checkpoint.commit.persist import PartResult, persist_part
from stager.workers.checkpoint.directory import files
from stager.workers.checkpoint.directory.envelope import seal, unseal
from stager.workers.checkpoint.directory.files import storage_errors
from stager.workers.checkpoint.layout.layout_check import check_count, check_text
from stager.workers.checkpoint.write.save_spec import SaveSpec, check_spec
from stager.workers.checkpoint.write.write_task import Extent, WriteTask
from stager.workers.errors import CorruptCheckpointError
from stager.workers.memory.attached import AttachedSlab

HEADER_SUFFIX = ".json"
_HASHED_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class ReplicaHeader:
    """Attributes:
    spec: of the save; without its directory, which may be mounted elsewhere.
    plan, plan_id, objects: see :class:`stager.workers.checkpoint.write.save_spec.WriteTask`.
    nbytes: of the slab that are used.
    digest: xxh3_128 of these, hex.
    """

    spec: SaveSpec
    plan: Extent
    plan_id: str
    objects: Extent
    nbytes: int
    digest: str

    @staticmethod
    def of(job: WriteTask) -> ReplicaHeader:
        """Of a whole snapshot. Hashes it."""
        nbytes = job.objects.offset + job.objects.nbytes
        digest = digest_of(job.slab.view, nbytes)
        # No links into checkpoints that may be gone when it is needed.
        spec = replace(job.spec, directory="", base_step=None)
        return ReplicaHeader(spec, job.plan, job.plan_id, job.objects, nbytes, digest)

    def to_bytes(self) -> bytes:
        # "facts" is the spec's name in headers since 0.1.
        return seal({"facts" if name == "spec" else name: value for name, value in asdict(self).items()})

    @staticmethod
    def from_bytes(data: bytes, path: str) -> ReplicaHeader:
        """What :meth:`to_bytes` wrote.

        Raises:
            CorruptCheckpointError: ``path`` is not such a header.
        """
        body: dict[str, Any] = unseal(data, path)
        try:
            header = ReplicaHeader(
                spec=check_spec(SaveSpec(**body["facts"])),
                plan=_extent(body["plan"]),
                plan_id=check_text(body["plan_id"]),
                objects=_extent(body["objects"]),
                nbytes=check_count(body["nbytes"]),
                digest=check_text(body["digest"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise CorruptCheckpointError(path, f"not the header of a replica: {error!r}") from error
        if max(extent.offset + extent.nbytes for extent in (header.plan, header.objects)) > header.nbytes:
            raise CorruptCheckpointError(path, "speaks of more bytes than the replica has")
        return header


def _extent(body: dict[str, Any]) -> Extent:
    return Extent(check_count(body["offset"]), check_count(body["nbytes"]))


def digest_of(view: memoryview, nbytes: int) -> str:
    """xxh3_128 of the first ``nbytes`` bytes, hex. In steps, without the GIL."""
    hasher = xxhash.xxh3_128()
    for start in range(0, nbytes, _HASHED_BYTES):
        hasher.update(view[start : min(nbytes, start + _HASHED_BYTES)])
    return hasher.hexdigest()


def read_header(path: str) -> ReplicaHeader | None:
    """Of the replica at ``path``; None: there is none, or it is not whole.

    Raises:
        StorageError, CorruptCheckpointError
    """
    data = files.read_if_exists(path + HEADER_SUFFIX)
    return None if data is None else ReplicaHeader.from_bytes(data, path + HEADER_SUFFIX)


def check_replica(path: str) -> None:
    """
    Raises:
        CorruptCheckpointError: it is not as it was sent, or not there.
        StorageError
    """
    header, slab = _open(path)
    if digest_of(slab.view, header.nbytes) != header.digest:
        raise CorruptCheckpointError(path, "its bytes are not those that were sent")


def persist_replica(path: str, part: int, directory: str, save_id: str) -> PartResult:
    """As :func:`stager.workers.checkpoint.commit.persist.persist_part`, from a replica that was checked.

    Args:
        directory: of the run.
        save_id: under which the share is to be written: the save's own, where other ranks' parts of it are still there.

    Raises:
        StorageError, CorruptCheckpointError
    """
    header, slab = _open(path)
    spec = replace(header.spec, directory=directory, save_id=save_id)
    job = WriteTask(spec, slab, header.plan, header.plan_id, header.objects, frozenset())
    return persist_part(job, part)


def _open(path: str) -> tuple[ReplicaHeader, AttachedSlab]:
    header = read_header(path)
    if header is None:
        raise CorruptCheckpointError(path, "is no whole replica")
    with storage_errors("open", path):
        fd = files.open_regular(path, os.O_RDWR)
        try:
            if os.fstat(fd).st_size < header.nbytes:
                raise CorruptCheckpointError(path, f"has not the {header.nbytes:,} bytes of its header")
            return header, AttachedSlab(path, fd, header.nbytes)
        finally:
            os.close(fd)
