"""Unchanged files: what an incremental save links instead of writing it again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from stager.workers.checkpoint.layout.layout import Segment

HashAll: TypeAlias = Callable[[Sequence[Segment]], Iterable[str]]


@dataclass(frozen=True, slots=True)
class HardLinkBase:
    """The checkpoint whose unchanged files may be linked.

    Attributes:
        directory: of the run.
        name: of the checkpoint.
        full_every: of so many saves in a row, one is written without links.
    """

    directory: str
    name: str
    full_every: int


@dataclass(slots=True)
class UnchangedFiles:
    """The unchanged files of a part, which were linked.

    Attributes:
        linked: numbers of the linked files.
        hashes: hashes of segments that are known already: all of linked files, some of other files.
        nbytes: size of the linked files.
        generation: see :class:`stager.workers.checkpoint.documents.manifest.ManifestHeader`.
        note: why unchanged files were written all the same; "": none were.
    """

    linked: set[int] = field(default_factory=set)
    hashes: dict[Segment, str] = field(default_factory=dict)
    nbytes: int = 0
    generation: int = 0
    note: str = ""
