"""The save spec: what a save is, beside its layout."""

from __future__ import annotations

from dataclasses import astuple, dataclass, field, fields, replace
from typing import Any

from stager.workers.checkpoint.documents import metrics
from stager.workers.checkpoint.documents.manifest import IndexFile
from stager.workers.checkpoint.documents.metrics import Metrics
from stager.workers.checkpoint.documents.names import check_name, checkpoint_name
from stager.workers.checkpoint.formats import FORMATS
from stager.workers.checkpoint.layout.layout_check import (
    check_count,
    check_sidecar_name,
    check_step,
    check_text,
    check_time,
)

_MAX_PARTS = 1 << 16
_MAX_RANKS = 1 << 24


@dataclass(frozen=True, slots=True)
class SaveSpec:
    """What workers and commit must know of a save, beside its layout.

    Attributes:
        directory: in which the checkpoint's directory is; absolute.
        save_id: unique, a nonce.
        kind: the on-disk format.
        num_parts: into how many parts this rank's contribution is partitioned.
        fsync: sync files and directories before each rename.
        created: unix time of the snapshot.
        stager, torch: versions, for the manifest.
        whole_bytes: files up to this size are not cut (``partition``); 0: the save is not incremental.
        base: name of the hard-link base, whose unchanged files may be linked; None: all files are written.
        full_every: of so many saves in a row, one is written without links.
        rank, num_ranks: which rank contributes this, of how many that make the checkpoint.
        metrics: as the user gave them to ``save()``; those of rank 0 are the checkpoint's.
        name: of the checkpoint's directory; "": the default one of its step.
        run, number: a nonce of the trainer's, and how many saves it had begun: of two to one name, the later one counts.
        sidecars: files that the user gave to ``save()``; those of rank 0 are the checkpoint's.
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
    base: str | None = None
    full_every: int = 0
    rank: int = 0
    num_ranks: int = 1
    metrics: Metrics = field(default_factory=dict, hash=False)
    name: str = ""
    run: str = ""
    number: int = 0
    sidecars: tuple[IndexFile, ...] = ()

    @property
    def final_name(self) -> str:
        """The name that the checkpoint's directory gets at commit."""
        return self.name or checkpoint_name(self.step)


def encode_spec(spec: SaveSpec) -> dict[str, Any]:
    """Return what JSON can hold of a spec. What is not there is left out, so that an older version can read it."""
    facts = {column.name: getattr(spec, column.name) for column in fields(spec)}
    facts["metrics"] = metrics.encode(spec.metrics)
    facts["sidecars"] = [astuple(file) for file in spec.sidecars]
    for optional in ("base", "metrics", "name", "sidecars"):
        if not facts[optional]:
            del facts[optional]
    return facts


def decode_spec(facts: dict[str, Any], **more: Any) -> SaveSpec:
    """Return the spec that :func:`encode_spec` made ``facts`` of, if it can be that of a save.

    Args:
        more: what ``facts`` does not have, or what takes its place.

    Raises:
        KeyError, TypeError, ValueError: it cannot.
    """
    facts = {**facts, **more}
    facts.pop("base_step", None)  # of version 0.1; a save that is finished after a crash links nothing
    facts["sidecars"] = tuple(
        IndexFile(check_sidecar_name(name), check_count(nbytes), check_text(digest))
        for name, nbytes, digest in facts.get("sidecars", ())
    )
    return check_spec(SaveSpec(**facts))


def check_spec(spec: SaveSpec) -> SaveSpec:
    """Return ``spec``, which was read from a file, if it can be the spec of a save."""
    check_step(spec.step)
    check_time(spec.created)
    for text in (spec.save_id, spec.kind, spec.stager, spec.torch, spec.run):
        check_text(text)
    for count in (spec.num_parts, spec.whole_bytes, spec.full_every, spec.rank, spec.num_ranks, spec.number):
        check_count(count)
    if spec.kind not in FORMATS:
        raise ValueError(f"unknown format {spec.kind!r}")
    if not 1 <= spec.num_parts <= _MAX_PARTS or type(spec.fsync) is not bool:
        raise ValueError(f"num_parts {spec.num_parts} or fsync {spec.fsync} is impossible")
    if not spec.rank < spec.num_ranks <= _MAX_RANKS:
        raise ValueError(f"rank {spec.rank} of {spec.num_ranks} is impossible")
    for name in (spec.base, spec.name):
        if name:
            check_name(name)
    return replace(spec, metrics=metrics.decode(spec.metrics))
