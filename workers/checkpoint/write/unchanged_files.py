"""What of a part need not be written: files whose bytes are those of the base's. See NOTE [ What may be linked ]."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import groupby

from stager.workers.checkpoint.directory.files import storage_errors
from stager.workers.checkpoint.layout.layout import Layout, Segment
from stager.workers.checkpoint.write.hard_link_base import CannotLinkError, HardLinkBase
from stager.workers.checkpoint.write.save_spec import SaveSpec
from stager.workers.faults import point

HashAll = Callable[[Sequence[Segment]], Iterable[str]]


@dataclass(slots=True)
class UnchangedFiles:
    """Attributes:
    linked: files of the layout that are in place: not to be written, nor opened for writing.
    hashes: those that are known already: all of the linked files', some of others'.
    nbytes: of the linked files.
    generation: see :class:`stager.workers.checkpoint.directory.manifest.Header`.
    note: why less was linked than could have been.
    """

    linked: set[int] = field(default_factory=set)
    hashes: dict[Segment, str] = field(default_factory=dict)
    nbytes: int = 0
    generation: int = 0
    note: str = ""

    def rest(self, layout: Layout, segments: list[Segment]) -> list[Segment]:
        """What has to be written."""
        return [s for s in segments if layout.items[s.index].file not in self.linked] if self.linked else segments

    def all_hashes(self, segments: list[Segment], rest: list[Segment], written: list[str]) -> tuple[str, ...]:
        """Of all segments, once the rest has been written and hashed."""
        if rest is segments:
            return tuple(written)
        known = {**self.hashes, **dict(zip(rest, written, strict=True))}
        return tuple(known[segment] for segment in segments)


def whole_files(layout: Layout, segments: Sequence[Segment]) -> dict[int, list[Segment]]:
    """The files that a part has all segments of."""
    by_file = {
        file: list(group) for file, group in groupby(segments, key=lambda segment: layout.items[segment.index].file)
    }
    return {
        file: group
        for file, group in by_file.items()
        if group[0].start == 0 and group[-1].end == layout.files[file].nbytes
    }


def reuse(
    spec: SaveSpec,
    layout: Layout,
    whole: dict[int, list[Segment]],
    hash_all: HashAll,
    directory_fd: int,
) -> UnchangedFiles:
    """Link every file of ``whole`` that the base has, byte for byte.

    Args:
        hash_all: the hashes of segments, from the slab, one after the other.

    Raises:
        StorageError
    """
    reused = UnchangedFiles()
    if spec.base_step is None or not whole:
        return reused
    try:
        base = HardLinkBase.open(spec.directory, spec.base_step)
    except CannotLinkError as error:
        reused.note = f"not incremental: {error}"
        return reused
    with closing(base):
        point("link.begin")
        if base.generation + 1 >= spec.full_every:
            reused.note = f"written in full, as one of {spec.full_every} saves is (persistence.full_every)"
            return reused
        for file, segments in whole.items():
            if _is_unchanged(base, layout, file, segments, hash_all, reused):
                _link(base, layout, file, directory_fd, reused)
        if reused.linked:
            reused.generation = base.generation + 1
    return reused


def _is_unchanged(
    base: HardLinkBase,
    layout: Layout,
    file: int,
    segments: list[Segment],
    hash_all: HashAll,
    reused: UnchangedFiles,
) -> bool:
    """Whether every hash is the base's. What was hashed up to the first that is not need not be hashed again."""
    expected = base.hashes(layout, file, range(segments[0].index, segments[-1].index + 1))
    if expected is None or len(expected) != len(segments):
        return False
    for segment, value, actual in zip(segments, expected, hash_all(segments), strict=True):
        reused.hashes[segment] = actual
        if actual != value:
            return False
    return True


def _link(base: HardLinkBase, layout: Layout, file: int, directory_fd: int, reused: UnchangedFiles) -> None:
    spec = layout.files[file]
    with storage_errors("link", os.path.join(base.name, spec.name)):
        try:
            base.link(spec.name, spec.nbytes, directory_fd)
        except CannotLinkError as error:
            reused.note = reused.note or f"written although unchanged: {error}"
            return
    reused.linked.add(file)
    reused.nbytes += spec.nbytes
    point("link.linked")


def sync_linked(layout: Layout, linked: set[int], directory_fd: int, directory: str) -> None:
    """The base may have been written without ``fsync``; and a link is only durable with its inode's count."""
    for file in linked:
        name = layout.files[file].name
        with storage_errors("sync", os.path.join(directory, name)):
            fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=directory_fd)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
