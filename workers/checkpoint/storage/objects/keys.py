"""Where the objects of a run lie: from paths as everybody else writes them to keys, and back."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from stager.workers.checkpoint.documents.manifest import MANIFEST_NAME
from stager.workers.checkpoint.documents.names import (
    is_data,
    is_partial,
    is_removing,
    parse_partial,
    parse_removing,
    partial_name,
    removing_name,
)

_DECISIONS, _REMOVALS = ".stager.decisions", ".stager.removing"


class Standing(Enum):
    """What a path stands for."""

    CHECKPOINT = "a checkpoint"
    PARTIAL = "a save that is not committed"
    REMOVING = "a save or checkpoint whose removal has begun"


@dataclass(frozen=True, slots=True)
class Place:
    """What a path of a run means.

    Attributes:
        root: key of the run's directory; "" for the whole bucket.
        name: of the checkpoint.
        save_id: "" for a checkpoint: its manifest tells.
    """

    standing: Standing
    root: str
    name: str
    save_id: str

    @property
    def manifest(self) -> str:
        """The key of the checkpoint's manifest."""
        return join(self.root, self.name, MANIFEST_NAME)

    def data(self, save_id: str = "") -> str:
        """The prefix of the data of a save; of this one if none is given."""
        return join(self.root, f"{self.name}.data-{save_id or self.save_id}")

    def decision(self, save_id: str = "") -> str:
        """The key of the object that says what becomes of a save; of this one if none is given."""
        return join(decisions(self.root), f"{self.name}.data-{save_id or self.save_id}")

    def removal(self, save_id: str = "") -> str:
        """The key of the object that says that the removal of a save has begun; of this one if none is given."""
        return join(removals(self.root), f"{self.name}.data-{save_id or self.save_id}")


def decisions(root: str) -> str:
    """Return the prefix of the objects that say what becomes of saves."""
    return join(root, _DECISIONS)


def removals(root: str) -> str:
    """Return the prefix of the objects that say which removals have begun."""
    return join(root, _REMOVALS)


def place_of(key: str) -> Place:
    """Return what the key of a directory in a run means."""
    root, _, name = key.rpartition("/")
    if is_partial(name):
        return Place(Standing.PARTIAL, root, *parse_partial(name))
    if is_removing(name):
        return Place(Standing.REMOVING, root, *parse_removing(name))
    return Place(Standing.CHECKPOINT, root, name, "")


def join(*parts: str) -> str:
    """Return a key; empty parts are left out."""
    return "/".join(part for part in parts if part)


def parse_data(prefix: str) -> tuple[str, str] | None:
    """Return (name of the checkpoint, save_id) of the prefix of a save's data, without its root; None: it is another's."""
    if not is_data(prefix):
        return None
    name, _, save_id = prefix.rpartition(".data-")
    return name, save_id


def name_when(standing: Standing, name: str, save_id: str) -> str:
    """Return the name that a save has in its run."""
    return (partial_name if standing is Standing.PARTIAL else removing_name)(name, save_id)


def stripe_key(data: str, file: str, offset: int) -> str:
    """Return the key of a stripe.

    Args:
        data: the prefix of the save's data.
        file: name of the data file.
        offset: in the file, of the stripe's first byte. Twenty digits, so that keys sort as offsets do.
    """
    return join(data, file, f"{offset:020d}")
