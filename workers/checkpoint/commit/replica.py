"""The replica of a rank's snapshot, which its partner keeps: the slab's bytes, and a header with the write task's facts.

    rank-3.0        the slab's bytes
    rank-3.0.json   the header, sealed; it exists only while the bytes are whole

``persist_part`` writes a checkpoint from a replica as it does from a snapshot: the same files and receipts that the rank
itself would have written.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace

import xxhash

from stager.workers.checkpoint.commit.persist import PartResult, persist_part
from stager.workers.checkpoint.documents.envelope import seal, unseal
from stager.workers.checkpoint.layout.layout_check import check_count, check_text
from stager.workers.checkpoint.storage.posix import files
from stager.workers.checkpoint.storage.posix.files import storage_errors
from stager.workers.checkpoint.write.save_spec import SaveSpec, decode_spec, encode_spec
from stager.workers.checkpoint.write.write_task import NOTHING, Extent, WriteTask
from stager.workers.errors import CorruptCheckpointError
from stager.workers.memory.attached import AttachedSlab
from stager.workers.memory.descriptor import Descriptor

HEADER_SUFFIX = ".json"
_HASHED_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class ReplicaHeader:
    """What a write task says, for a snapshot that is a replica.

    Attributes:
        spec: of the save; without its directory, which may be mounted elsewhere.
        nbytes: how many bytes of the slab are used.
        digest: xxh3_128 of these bytes, hex.
    """

    spec: SaveSpec
    plan: Extent
    plan_id: str
    objects: Extent
    nbytes: int
    digest: str
    sidecars: Extent = NOTHING

    @staticmethod
    def of(task: WriteTask) -> ReplicaHeader:
        """Make the header of a whole snapshot; hashes its bytes."""
        nbytes = max(extent.offset + extent.nbytes for extent in (task.objects, task.sidecars))
        # No hard-link base: that checkpoint may be gone when the replica is needed.
        spec = replace(task.spec, directory="", base=None)
        digest = digest_of(task.slab.view, nbytes)
        return ReplicaHeader(spec, task.plan, task.plan_id, task.objects, nbytes, digest, task.sidecars)

    def to_bytes(self) -> bytes:
        """Serialise the header, sealed."""
        places = {name: asdict(getattr(self, name)) for name in ("plan", "objects", "sidecars")}
        if self.sidecars == NOTHING:
            del places["sidecars"]  # so that an older version can read the header
        return seal(  # "facts": the key of version 0.1
            {
                "facts": encode_spec(self.spec),
                "plan_id": self.plan_id,
                "nbytes": self.nbytes,
                "digest": self.digest,
                **places,
            }
        )

    @staticmethod
    def from_bytes(data: bytes, path: str) -> ReplicaHeader:
        """Parse what :meth:`to_bytes` wrote.

        Raises:
            CorruptCheckpointError: ``path`` is not such a header.
        """
        body = unseal(data, path)
        try:
            spec, nbytes = decode_spec(body["facts"]), check_count(body["nbytes"])
            plan, objects, sidecars = (
                Extent(check_count(extent["offset"]), check_count(extent["nbytes"]))
                for extent in (body["plan"], body["objects"], body.get("sidecars", asdict(NOTHING)))
            )
            plan_id, digest = check_text(body["plan_id"]), check_text(body["digest"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise CorruptCheckpointError(path, f"is not the header of a replica: {error!r}") from error
        if (end := max(extent.offset + extent.nbytes for extent in (plan, objects, sidecars))) > nbytes:
            raise CorruptCheckpointError(path, f"refers to bytes up to {end:,}, and the replica has {nbytes:,}")
        return ReplicaHeader(spec, plan, plan_id, objects, nbytes, digest, sidecars)


def digest_of(view: memoryview, nbytes: int) -> str:
    """Return the xxh3_128 of the first ``nbytes`` bytes, hex. Releases the GIL while it hashes."""
    hasher = xxhash.xxh3_128()
    for start in range(0, nbytes, _HASHED_BYTES):
        hasher.update(view[start : min(nbytes, start + _HASHED_BYTES)])
    return hasher.hexdigest()


def read_header(path: str) -> ReplicaHeader | None:
    """Read the header of the replica at ``path``. Returns None if it is missing: no replica, or an incomplete one."""
    data = files.read_if_exists(path + HEADER_SUFFIX)
    return None if data is None else ReplicaHeader.from_bytes(data, path + HEADER_SUFFIX)


def check_replica(path: str) -> None:
    """Check the bytes of the replica at ``path`` against its header.

    Raises:
        CorruptCheckpointError: the replica is missing, incomplete or damaged.
        StorageError
    """
    header, slab = _open(path)
    if digest_of(slab.view, header.nbytes) != header.digest:
        raise CorruptCheckpointError(path, "is damaged: its bytes do not match the hash in its header")


def persist_replica(path: str, part: int, directory: str, save_id: str, lock: Descriptor) -> PartResult:
    """Write a part from a replica that :func:`check_replica` accepted, as ``persist_part`` does from a snapshot.

    Args:
        directory: of the run.
        lock: on the directory.
        save_id: of the save to write. It is the replica's own if other ranks' parts of that save still exist.
    """
    header, slab = _open(path)
    spec = replace(header.spec, directory=directory, save_id=save_id)
    task = WriteTask(
        spec=spec,
        slab=slab,
        plan=header.plan,
        plan_id=header.plan_id,
        objects=header.objects,
        live_slabs=frozenset(),
        lock=lock,
        sidecars=header.sidecars,
    )
    return persist_part(task, part)


def _open(path: str) -> tuple[ReplicaHeader, AttachedSlab]:
    header = read_header(path)
    if header is None:
        raise CorruptCheckpointError(path, "is not a complete replica: it has no header")
    with storage_errors("open", path):
        fd = files.open_regular(path, os.O_RDWR)
        try:
            if os.fstat(fd).st_size < header.nbytes:
                raise CorruptCheckpointError(path, f"is shorter than the {header.nbytes:,} bytes that its header says")
            return header, AttachedSlab(path, fd, header.nbytes)
        finally:
            os.close(fd)
