"""The keys of the rendezvous: every name under which ranks post, count or meet.

A key that ends in a save id, a round or a step belongs to one save, one load or one restore, so no key is used twice.
Save ids come from :meth:`stager.ranks.rank_group.RankGroup.save_id`: every rank derives the same one.
"""

from __future__ import annotations

from collections.abc import Sequence

OPENING = "opening"  # barrier: every rank holds the run's lock
OPENED = "opened"  # broadcast of DirectoryOpened
NEWEST = "newest"  # NewestStep: the step of the last checkpoint that a rank knows of
REPLICAS_NEWEST = "replicas/newest"  # broadcast of NewestStep, after a restore: the newest checkpoint on the disk
REPLICAS_OPENED = "replicas/opened"  # barrier: rank 0 has tidied the directory up after a restore


def host(name: str) -> str:
    """Count of the ranks on a host."""
    return f"host/{name}"


def save_end(save_id: str) -> str:
    """``SaveCommitted`` or ``SaveFailed``: how a save ended."""
    return f"saves/{save_id}"


def every_part(save_id: str) -> str:
    """``EveryPartWritten``: at a deadline, only the commit was missing."""
    return f"saves/{save_id}/every-part"


def commit_helpers(save_id: str) -> str:
    """Count of the ranks, other than rank 0, that found every part and no commit."""
    return f"saves/{save_id}/helpers"


def agreement(save_id: str) -> str:
    """Barrier and head of the agreement on who writes what. Keyed by save id, because retry counts differ between ranks."""
    return f"agreement/{save_id}"


def load(number: int) -> str:
    """Barrier and head of the ``number``-th try to load."""
    return f"load/{number}"


def restore(number: int) -> str:
    """Barrier and head of the ``number``-th restore from replicas; the first is number 1."""
    return f"replicas/restore/{number}"


def exchange(ranks: Sequence[int], save_id: str) -> str:
    """Barrier of two partners before they exchange the replicas of a save."""
    return f"replicas/{ranks[0]}-{ranks[1]}/{save_id}"


def replica_fate(save_id: str) -> str:
    """``ReplicaFate`` of a save; ``/received`` under it counts the ranks that hold their replica."""
    return f"replicas/whole/{save_id}"
