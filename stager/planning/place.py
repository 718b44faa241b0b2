"""``Place``: what is known of where a run keeps its checkpoints, which need not exist yet."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from stager.doctor import probes
from stager.doctor.target_probe import existing_directory
from stager.workers.checkpoint.storage.places import is_url


@dataclass(frozen=True)
class Place:
    """The directory of a run.

    Attributes:
        path: as the user named it; may be a URL in an object store.
        fstype: kind of its file system; empty if it is not known.
        free_bytes: what an ordinary user may still write there.
    """

    path: str
    fstype: str
    free_bytes: int


def look_at(path: str) -> Place:
    """Look at ``path``, or the nearest directory above it that exists. Writes nothing. An object store is not asked."""
    if is_url(path):
        return Place(path, "", sys.maxsize)
    existing = existing_directory(path)
    mount = probes.mount_of(existing)
    return Place(path, mount.fstype if mount is not None else "", probes.free_space(existing)[0])
