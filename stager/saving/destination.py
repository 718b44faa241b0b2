"""Where a save goes."""

from __future__ import annotations

import os
from dataclasses import dataclass

from stager.workers.checkpoint.documents.names import checkpoint_name
from stager.workers.memory.descriptor import Descriptor


@dataclass(frozen=True, slots=True)
class Destination:
    """The directory that a checkpoint will be.

    Attributes:
        directory: in which it is; absolute.
        name: of the checkpoint's own directory.
        lock: on ``directory``. It travels with each task, so that workers hold it when this process is gone. None: nothing
            is written there.
    """

    directory: str
    name: str
    lock: Descriptor | None

    @property
    def path(self) -> str:
        """The path of the checkpoint."""
        return self.path_of(self.directory, self.name)

    @staticmethod
    def path_of(directory: str, name: str) -> str:
        """Return the path of the checkpoint of a name."""
        return os.path.join(directory, name)

    def name_in_spec(self, step: int) -> str:
        """The name as a save spec has it: "" for the default one of its step."""
        return "" if self.name == checkpoint_name(step) else self.name
