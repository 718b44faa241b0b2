"""How a pool runs its workers, and what each worker is told when it starts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

IONICE_CLASSES = ("none", "low", "idle")
_LEAST = {
    "start_timeout_secs": 0,
    "max_restarts": 0,
    "max_timeouts": 1,
    "task_timeout_secs": 0,
    "orphan_timeout_secs": 0,
    "shutdown_timeout_secs": 0,
}


@dataclass(frozen=True, slots=True)
class PoolOptions:
    """How a pool runs its workers.

    Attributes:
        nice: added to each worker's niceness, 0..19.
        ionice: "none", "low" or "idle".
        start_timeout_secs: a worker that is not ready by then is killed and replaced.
        max_restarts: how often one task may lose its worker before its Future fails, and how often in a row workers
            may fail to start before what waits for them fails.
        max_timeouts: how often one task may miss ``task_timeout_secs`` before its Future fails. A task that always hangs
            fails after so many timeouts, and the starts of as many workers.
        task_timeout_secs: a task that runs longer has its worker killed; ``None``: no limit.
        heartbeat_timeout_secs: a worker that holds a task and shows no sign of life is killed by then; ``None``: no such
            limit. See NOTE [ When a worker is stuck ] in ``workers/pool/heartbeat.py``.
        orphan_timeout_secs: how long workers may finish what was handed over when the trainer is gone.
        shutdown_timeout_secs: each rung of the shutdown ladder (``workers/pool/supervisor.py``).
        env: environment variables for the workers, on top of this process's. Torch has one thread in each worker, unless
            ``OMP_NUM_THREADS`` and ``MKL_NUM_THREADS`` are set here.

    Raises:
        ValueError: a value is out of its range.
    """

    nice: int = 0
    ionice: str = "none"
    start_timeout_secs: float = 120.0
    max_restarts: int = 8
    max_timeouts: int = 3
    task_timeout_secs: float | None = None
    heartbeat_timeout_secs: float | None = 30.0
    orphan_timeout_secs: float = 600.0
    shutdown_timeout_secs: float = 10.0
    env: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.nice <= 19:
            raise ValueError(f"nice must be 0 to 19, got {self.nice}")
        if self.ionice not in IONICE_CLASSES:
            raise ValueError(f"ionice must be one of {', '.join(IONICE_CLASSES)}, got {self.ionice!r}")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and not value >= least:  # so NaN is refused, too
                raise ValueError(f"{name} must be {least} or more, got {value}")
        if self.heartbeat_timeout_secs is not None and not self.heartbeat_timeout_secs > 0:
            raise ValueError(f"heartbeat_timeout_secs must be more than 0, got {self.heartbeat_timeout_secs}")


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """What a worker is told on its command line. See :class:`PoolOptions`; ``beat_secs`` lie between two heartbeats."""

    parent_pid: int
    nice: int
    ionice: str
    orphan_timeout_secs: float
    beat_secs: float

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> WorkerSettings:
        return WorkerSettings(**json.loads(text))
