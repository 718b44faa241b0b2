"""What one child process is asked to do. Passed to it as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Literal

MARK = "STAGER_BENCHMARK"  # in the environment of a child and of everything it starts


@dataclass(frozen=True, slots=True)
class Job:
    """One peer on one case, once.

    Attributes:
        directory: an empty directory for its checkpoints.
        records: file that it appends its records to.
        measure: times, or the memory of the process tree (then nothing is timed: being watched costs time).
        round: which pass over the peers this is.
    """

    case: str
    peer: str
    measure: Literal["times", "memory"]
    round: int
    scale: float
    seed: int
    saves: int
    cap_secs: float
    pairs: int
    stretch_steps: int
    soak_saves: int
    alone_secs: float
    directory: str
    records: str

    def to_text(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_text(text: str) -> Job:
        return Job(**json.loads(text))
