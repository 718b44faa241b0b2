"""The save spec: what a save is, beside its layout."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from stager.workers.checkpoint.directory import metrics
from stager.workers.checkpoint.directory.metrics import Metrics
from stager.workers.checkpoint.formats import FORMATS
from stager.workers.checkpoint.layout.layout_check import check_count, check_step, check_text, check_time

_MAX_PARTS = 1 << 16
_MAX_RANKS = 1 << 24


@dataclass(frozen=True, slots=True)
class SaveSpec:
    """What workers and commit must know of a save, beside its layout.

    Attributes:
        directory: of the run; absolute.
        save_id: unique, a nonce.
        kind: the on-disk format.
        num_parts: into how many parts this rank's contribution is partitioned.
        fsync: sync files and directories before each rename.
        created: unix time of the snapshot.
        stager, torch: versions, for the manifest.
        whole_bytes: files up to this size are not cut (``partition``); 0: the save is not incremental.
        base_step: the hard-link base, whose unchanged files may be linked; None: all files are written.
        full_every: of so many saves in a row, one is written without links.
        rank, num_ranks: which rank contributes this, of how many that make the checkpoint.
        metrics: as the user gave them to ``save()``; those of rank 0 are the checkpoint's.
    """

    directory: str
    step: int
    save_id: str
    kind: str
    num_parts: int
    fsync: bool
    created: float
    stager: str
    torch: str
    whole_bytes: int = 0
    base_step: int | None = None
    full_every: int = 0
    rank: int = 0
    num_ranks: int = 1
    metrics: Metrics = field(default_factory=dict, hash=False)


def check_spec(spec: SaveSpec) -> SaveSpec:
    """Return ``spec``, which was read from a file, if it can be the spec of a save."""
    check_step(spec.step)
    check_time(spec.created)
    for text in (spec.save_id, spec.kind, spec.stager, spec.torch):
        check_text(text)
    for count in (spec.num_parts, spec.whole_bytes, spec.full_every, spec.rank, spec.num_ranks):
        check_count(count)
    if spec.kind not in FORMATS:
        raise ValueError(f"unknown format {spec.kind!r}")
    if not 1 <= spec.num_parts <= _MAX_PARTS or type(spec.fsync) is not bool:
        raise ValueError(f"num_parts {spec.num_parts} or fsync {spec.fsync} is impossible")
    if not spec.rank < spec.num_ranks <= _MAX_RANKS:
        raise ValueError(f"rank {spec.rank} of {spec.num_ranks} is impossible")
    if spec.base_step is not None:
        check_step(spec.base_step)
    return replace(spec, metrics=metrics.decode(spec.metrics))
