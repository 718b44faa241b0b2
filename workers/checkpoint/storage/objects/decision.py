"""What becomes of a save: it is committed or withdrawn, whichever is decided first. See NOTE [ Commit without a rename ]."""

from __future__ import annotations

from enum import Enum

from stager.workers.checkpoint.storage.objects.client import Client
from stager.workers.checkpoint.storage.objects.keys import Place


class Decision(Enum):
    """What an object ``decision`` says."""

    COMMIT = b"commit"
    WITHDRAW = b"withdraw"


def decide(client: Client, place: Place, wanted: Decision, save_id: str = "") -> tuple[Decision, bool]:
    """Decide what becomes of a save, unless that is decided already.

    Args:
        save_id: of the save; "": that of ``place``.

    Returns:
        What is decided, and whether this call did it.
    """
    while True:
        if client.create(place.decision(save_id), wanted.value):
            return wanted, True
        found = decided(client, place, save_id)
        if found is not None:
            # A request whose answer was lost is repeated, and then finds what it has itself written.
            return found, False


def decided(client: Client, place: Place, save_id: str = "") -> Decision | None:
    """Return what is decided; None: nothing yet. Arguments: :func:`decide`."""
    try:
        return Decision(client.get(place.decision(save_id)))
    except FileNotFoundError:
        return None


def is_being_removed(client: Client, place: Place, save_id: str = "") -> bool:
    """Return whether a save must not be touched any more: it was withdrawn, or its removal has begun.

    Args:
        save_id: of the save; "": that of ``place``.
    """
    return decided(client, place, save_id) is Decision.WITHDRAW or client.exists(place.removal(save_id))
