"""What becomes of a save: it is committed or withdrawn, whichever is decided first. See NOTE [ Commit without a rename ]."""

from __future__ import annotations

from enum import Enum

from stager.workers.checkpoint.storage.objects.client import Client
from stager.workers.checkpoint.storage.objects.keys import DECISION, REMOVING, join


class Decision(Enum):
    """What an object ``decision`` says."""

    COMMIT = b"commit"
    WITHDRAW = b"withdraw"


def decide(client: Client, data: str, wanted: Decision) -> tuple[Decision, bool]:
    """Decide what becomes of a save, unless that is decided already.

    Args:
        data: the prefix of the save's data.

    Returns:
        What is decided, and whether this call did it.
    """
    key = join(data, DECISION)
    while True:
        if client.create(key, wanted.value):
            return wanted, True
        found = decided(client, data)
        if found is not None:
            # A request whose answer was lost is repeated, and then finds what it has itself written.
            return found, False


def decided(client: Client, data: str) -> Decision | None:
    """Return what is decided; None: nothing yet."""
    try:
        return Decision(client.get(join(data, DECISION)))
    except FileNotFoundError:
        return None


def is_being_removed(client: Client, data: str) -> bool:
    """Return whether a save must not be touched any more: it was withdrawn, or its removal has begun."""
    return decided(client, data) is Decision.WITHDRAW or client.exists(join(data, REMOVING))
