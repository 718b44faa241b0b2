"""What a worker is told when it is started."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """What a worker is told when it is started.

    Attributes:
        nonce: the pool's.
        parent_pid: the pool's process.
        nice: added to the process's niceness, 0..19.
        ionice: "none", "low" (best effort, lowest) or "idle".
        orphan_timeout_secs: how long an orphan may go on working.
        beat_secs: pause between two signs of life.
        torch_threads: intra-op threads.
    """

    nonce: str
    parent_pid: int
    nice: int = 0
    ionice: str = "none"
    orphan_timeout_secs: float = 600.0
    beat_secs: float = 5.0
    torch_threads: int = 1

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> WorkerSettings:
        return WorkerSettings(**json.loads(text))
