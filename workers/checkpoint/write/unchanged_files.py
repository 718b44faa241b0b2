"""Link the unchanged files of an incremental save instead of writing them. See NOTE [ What may be linked ]."""

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
    """The unchanged files of a part, which were linked.

    Attributes:
        linked: indices of the linked files. They must not be opened for writing.
        hashes: hashes of segments that are known already: all of linked files, some of other files.
        nbytes: size of the linked files.
        generation: see :class:`stager.workers.checkpoint.directory.manifest.Header`.
        note: why unchanged files were written all the same; "": none were.
    """

    linked: set[int] = field(default_factory=set)
    hashes: dict[Segment, str] = field(default_factory=dict)
    nbytes: int = 0
    generation: int = 0
    note: str = ""

    def rest(self, layout: Layout, segments: list[Segment]) -> list[Segment]:
        """Return the segments that must be written."""
        return [s for s in segments if layout.items[s.index].file not in self.linked] if self.linked else segments

    def all_hashes(self, segments: list[Segment], rest: list[Segment], written: list[str]) -> tuple[str, ...]:
        """Return the hashes of all segments, given those of the ``rest``, which were ``written``."""
        if rest is segments:
            return tuple(written)
        known = {**self.hashes, **dict(zip(rest, written, strict=True))}
        return tuple(known[segment] for segment in segments)


def whole_files(layout: Layout, segments: Sequence[Segment]) -> dict[int, list[Segment]]:
    """Return the files that a part has all segments of, and these segments."""
    by_file = {
        file: list(group) for file, group in groupby(segments, key=lambda segment: layout.items[segment.index].file)
    }
    return {
        file: group
        for file, group in by_file.items()
        if group[0].start == 0 and group[-1].end == layout.files[file].nbytes
    }


def link_unchanged(
    spec: SaveSpec,
    layout: Layout,
    whole: dict[int, list[Segment]],
    hash_all: HashAll,
    directory_fd: int,
) -> UnchangedFiles:
    """Link each file of ``whole`` whose bytes are the same in the hard-link base.

    Args:
        hash_all: hashes segments of the slab, one after the other.

    Raises:
        StorageError
    """
    unchanged = UnchangedFiles()
    if spec.base_step is None or not whole:
        return unchanged
    try:
        base = HardLinkBase.open(spec.directory, spec.base_step)
    except CannotLinkError as error:
        unchanged.note = f"not incremental: {error}"
        return unchanged
    with closing(base):
        point("link.begin")
        if base.generation + 1 >= spec.full_every:
            unchanged.note = f"written in full, as one of {spec.full_every} saves is (persistence.full_every)"
            return unchanged
        for file, segments in whole.items():
            if _is_unchanged(base, layout, file, segments, hash_all, unchanged):
                _link(base, layout, file, directory_fd, unchanged)
        if unchanged.linked:
            unchanged.generation = base.generation + 1
    return unchanged


def _is_unchanged(
    base: HardLinkBase,
    layout: Layout,
    file: int,
    segments: list[Segment],
    hash_all: HashAll,
    unchanged: UnchangedFiles,
) -> bool:
    """Return whether every hash is the base's. Stops at the first that differs, and keeps the hashes up to there."""
    expected = base.hashes(layout, file, range(segments[0].index, segments[-1].index + 1))
    if expected is None or len(expected) != len(segments):
        return False
    for segment, value, actual in zip(segments, expected, hash_all(segments), strict=True):
        unchanged.hashes[segment] = actual
        if actual != value:
            return False
    return True


def _link(base: HardLinkBase, layout: Layout, file: int, directory_fd: int, unchanged: UnchangedFiles) -> None:
    spec = layout.files[file]
    with storage_errors("link", os.path.join(base.name, spec.name)):
        try:
            base.link(spec.name, spec.nbytes, directory_fd)
        except CannotLinkError as error:
            unchanged.note = unchanged.note or f"written although unchanged: {error}"
            return
    unchanged.linked.add(file)
    unchanged.nbytes += spec.nbytes
    point("link.linked")


def sync_linked(layout: Layout, linked: set[int], directory_fd: int, directory: str) -> None:
    """Sync linked files: the base may have been written without ``fsync``, and a link is durable only with its inode."""
    for file in linked:
        name = layout.files[file].name
        with storage_errors("sync", os.path.join(directory, name)):
            fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=directory_fd)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
