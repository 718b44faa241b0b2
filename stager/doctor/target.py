"""Checks of the directory that checkpoints go to."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from stager.config.sizes import format_bytes
from stager.doctor.finding import Finding, Status


@dataclass(frozen=True)
class Mount:
    """A line of ``/proc/self/mountinfo``: where, what kind, from what, and whether it is read-only."""

    point: str
    fstype: str
    source: str
    read_only: bool


def parse_mountinfo(text: str) -> list[Mount]:
    """Parse /proc/pid/mountinfo, see proc_pid_mountinfo(5). Other lines are skipped."""
    mounts = []
    for line in text.splitlines():
        left, separator, right = line.partition(" - ")
        fields, origin = left.split(" "), right.split(" ")
        if separator and len(fields) >= 6 and len(origin) >= 3:
            options = {*fields[5].split(","), *origin[2].split(",")}
            mounts.append(Mount(_unescaped(fields[4]), origin[0], _unescaped(origin[1]), "ro" in options))
    return mounts


def find_mount(mounts: list[Mount], path: str) -> Mount | None:
    """The mount that ``path`` (absolute, without symbolic links) is on: the deepest one, and the last of equals."""
    best = None
    for mount in mounts:
        inside = path == mount.point or path.startswith(mount.point.rstrip("/") + "/")
        if inside and (best is None or len(mount.point) >= len(best.point)):
            best = mount
    return best


@dataclass(frozen=True)
class _Kind:
    """File systems that mean the same for a commit."""

    fstypes: frozenset[str]
    status: Status
    meaning: str
    advice: str = ""


_KINDS = (
    _Kind(
        frozenset(["ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "bcachefs", "jfs", "reiserfs"]),
        Status.OK,
        "a local file system: rename is atomic, and fsync reaches the disk",
    ),
    _Kind(
        frozenset(["tmpfs", "ramfs", "devtmpfs"]),
        Status.WARN,
        "checkpoints are in memory: they count against it, and are lost at a reboot",
        "save to a disk, unless you want that",
    ),
    _Kind(
        frozenset(["overlay", "aufs"]),
        Status.WARN,
        "a container's own layer: checkpoints are lost with the container",
        "mount a volume for checkpoints",
    ),
    _Kind(
        frozenset(
            [
                "nfs",
                "nfs4",
                "lustre",
                "gpfs",
                "beegfs",
                "ceph",
                "wekafs",
                "glusterfs",
                "panfs",
                "pvfs2",
                "afs",
                "ocfs2",
                "gfs2",
            ]
        ),
        Status.OK,
        "a network file system: fsync waits for the server, and other hosts may see a commit some seconds later",
    ),
    _Kind(
        frozenset(["9p", "virtiofs", "vboxsf", "drvfs", "cifs", "smb3"]),
        Status.WARN,
        "a share of another system: locks and fsync may not be what they are on a local disk",
        "save to a local disk, and copy from there",
    ),
)
_FUSE = _Kind(
    frozenset(),
    Status.WARN,
    "a FUSE file system: whether rename is atomic and fsync durable is up to it; for object stores they often are not",
    "save to a local or cluster file system, and copy from there",
)
_OTHER = _Kind(frozenset(), Status.OK, "stager knows nothing special about this file system; see the write test")


def check_filesystem(mount: Mount | None) -> Finding:
    """What the kind of file system means for a commit."""
    name = "file system"
    if mount is None:
        return Finding(
            name, "unknown", Status.WARN, "no line of /proc/self/mountinfo is about it", "try another directory"
        )
    value = f"{mount.fstype} from {mount.source} on {mount.point}"
    if mount.read_only:
        return Finding(
            name,
            f"{value}, read-only",
            Status.FAIL,
            "nothing can be saved there",
            "remount it, or save to another directory",
        )
    kind = _kind_of(mount.fstype)
    return Finding(name, value, kind.status, kind.meaning, kind.advice)


def _kind_of(fstype: str) -> _Kind:
    if fstype in ("fuse", "fuseblk") or fstype.startswith("fuse."):
        return _FUSE
    return next((kind for kind in _KINDS if fstype in kind.fstypes), _OTHER)


def check_free_space(free_bytes: int, total_bytes: int, free_inodes: int | None) -> Finding:
    """Judge whether the file system has room for checkpoints.

    Args:
        free_bytes: what an ordinary user may still write.
        total_bytes: of the file system.
        free_inodes: files that can still be made; None where there is no such limit.
    """
    name, value = "free space", f"{format_bytes(free_bytes)} of {format_bytes(total_bytes)}"
    if free_inodes is not None and free_inodes < 1000:
        meaning = f"only {free_inodes} more files can be made; a checkpoint takes one for each worker and a few more"
        return Finding(name, value, Status.FAIL if free_inodes < 20 else Status.WARN, meaning, "remove small files")
    meaning = (
        "this is the room for all checkpoints together, including the one being written; quotas are not considered"
    )
    if free_bytes < 1 << 30:
        status = Status.FAIL if free_bytes < 16 << 20 else Status.WARN
        return Finding(name, value, status, meaning, "free some, or save to another file system")
    return Finding(name, value, Status.OK, meaning)


@dataclass(frozen=True)
class ProbeFacts:
    """What happened when a small file was written.

    Attributes:
        directory: where: the target, or the nearest directory above it that exists.
        exists: it is the target itself.
        nbytes, secs: what was written and how long write and fsync took; 0 if nothing was.
        problem: what failed, with its cause; None if nothing did.
        lock_problem: why ``flock`` failed; None if it works.
    """

    directory: str
    exists: bool
    nbytes: int
    secs: float
    problem: str | None
    lock_problem: str | None


def check_write(facts: ProbeFacts) -> Finding:
    """Judge whether a save can write, sync and rename in the directory, and how fast."""
    name = "write, fsync, rename"
    where = facts.directory if facts.exists else f"{facts.directory} (the target does not exist yet)"
    if facts.problem is not None:
        advice = "check owner, mode and quota of the directory, or save elsewhere"
        return Finding(name, f"{facts.problem}, in {where}", Status.FAIL, "a save there will fail the same way", advice)
    rate = facts.nbytes / facts.secs / 1e6 if facts.secs > 0 else 0.0
    value = f"{rate:.0f} MB/s for {format_bytes(facts.nbytes)}, in {where}"
    meaning = f"all three work; at this rate a checkpoint of 10 GB is durable after about {_duration(10e9, rate)}"
    if rate < 20:
        advice = "save less often, or to a faster disk; a save that is not durable yet delays a later one"
        return Finding(name, value, Status.WARN, meaning, advice)
    return Finding(name, value, Status.OK, meaning)


def check_lock(facts: ProbeFacts) -> Finding | None:
    """Judge whether a run can lock its directory; None if nothing could be written, so that no lock was tried."""
    if facts.problem is not None:
        return None
    if facts.lock_problem is None:
        return Finding("flock", "works", Status.OK, "two runs cannot save into one directory by mistake")
    meaning = "stager locks the directory of a run and cannot do so here"
    advice = "Lustre: mount with -o flock; NFS: check the lock service; or save to another file system"
    return Finding("flock", facts.lock_problem, Status.FAIL, meaning, advice)


def _duration(nbytes: float, megabytes_per_sec: float) -> str:
    if megabytes_per_sec <= 0:
        return "a time too long to tell"
    secs = nbytes / 1e6 / megabytes_per_sec
    return f"{secs:.0f} s" if secs < 120 else f"{secs / 60:.0f} min"


def _unescaped(field: str) -> str:
    """mountinfo writes space, tab, newline and backslash as three octal digits, byte by byte."""
    raw = re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), os.fsencode(field))
    return os.fsdecode(raw)
