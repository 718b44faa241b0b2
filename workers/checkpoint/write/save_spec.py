"""What a save is, beside its layout: all that a commit has to know."""

from __future__ import annotations

from dataclasses import dataclass

from stager.workers.checkpoint.formats import FORMATS
from stager.workers.checkpoint.layout.layout_check import check_count, check_step, check_text, check_time

_MAX_PARTS = 1 << 16
_MAX_RANKS = 1 << 24


@dataclass(frozen=True, slots=True)
class SaveSpec:
    """What a commit has to know beside the layout.

    Attributes:
        directory: of the run; absolute.
        step, save_id: which save; ``save_id`` is unique, a nonce.
        kind: the on-disk format.
        num_parts: how many parts this rank's share of the save is dealt into.
        fsync: sync files and directories before each rename.
        created: unix time of the snapshot.
        stager, torch: versions, for the manifest.
        whole_bytes: files up to this size are dealt whole (``deal``); 0: the save is not incremental.
        base_step: the checkpoint whose files may be linked where nothing changed; None: there is none.
        full_every: of so many saves in a row, one is written without links.
        rank, num_ranks: whose share this is, of how many that make up the checkpoint.
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


def check_spec(spec: SaveSpec) -> SaveSpec:
    """``spec``, when they can be those of a save.

    Raises:
        ValueError, TypeError
    """
    check_step(spec.step)
    check_time(spec.created)
    for text in (spec.save_id, spec.kind, spec.stager, spec.torch):
        check_text(text)
    if spec.kind not in FORMATS:
        raise ValueError(f"unknown format {spec.kind!r}")
    if not 1 <= check_count(spec.num_parts) <= _MAX_PARTS or type(spec.fsync) is not bool:
        raise ValueError("impossible facts")
    check_count(spec.whole_bytes)
    check_count(spec.full_every)
    if not 1 <= check_count(spec.num_ranks) <= _MAX_RANKS or check_count(spec.rank) >= spec.num_ranks:
        raise ValueError("impossible ranks")
    if spec.base_step is not None:
        check_step(spec.base_step)
    return spec
