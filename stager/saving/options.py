"""The settings of a Saver."""

from __future__ import annotations

from dataclasses import dataclass

from stager.workers.checkpoint.write.write_back import PLAIN, Writing


@dataclass(frozen=True, slots=True)
class SaverOptions:
    """The settings of a Saver, worked out from the configuration.

    Attributes:
        directory: of the run, absolute.
        kind: name of the on-disk format.
        num_parts: into how many parts a save in one piece is divided: one for each worker.
        fsync, check_free_space, segment_bytes, incremental, full_every: see the configuration's section persistence.
        verify: see the section staging.
        safe_globals: see the section loading; what it lacks is warned of when it is saved.
        differing: see the section ranks.
        writing: how one worker writes.
    """

    directory: str
    kind: str
    num_parts: int
    fsync: bool
    check_free_space: bool
    segment_bytes: int
    verify: bool
    writing: Writing = PLAIN
    incremental: bool = False
    full_every: int = 0
    safe_globals: tuple[str, ...] = ()
    differing: str = "error"
