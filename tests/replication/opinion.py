"""What a rank thinks of which save is whole: the one place of the tests that looks into a Replicator for it."""

from __future__ import annotations

from stager.replication.replicator import Replicator


def receive(rank: Replicator, save_id: str) -> None:
    """This rank has received its replica of a save."""
    rank._count(save_id)


def make_room(rank: Replicator, save_id: str) -> bool:
    """This rank is about to overwrite its replica of a save; whether it may."""
    return rank._give_up(save_id)


def whole_id(rank: Replicator) -> str:
    """The newest save of which it knows that every partner has it."""
    rank._update_whole_id()
    return rank._whole_id
