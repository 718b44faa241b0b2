"""Drawing one fault of a kind."""

from __future__ import annotations

import random
from collections.abc import Callable

from stager.stress.config import Kind, StressSettings
from stager.stress.fault_kinds import (
    COMMIT_POINTS,
    ERRNOS,
    LIFE_POINTS,
    PART_POINTS,
    STORAGE_POINTS,
    TRAINER_POINTS,
    WORKER_POINTS,
    Action,
    Damage,
    Fault,
    FullDisk,
    How,
    PointFault,
    Pressure,
    Relief,
    RemovePartial,
    SignalFault,
    SignalName,
    Target,
)

# Likelier values are listed more often.
_RELIEFS: tuple[Relief, ...] = ("continue", "continue", "kill")
_HOW: tuple[How, ...] = ("flip", "flip", "truncate", "remove", "extend")
_TARGETS: tuple[Target, ...] = ("trainer", "trainer", "worker", "worker", "any")
_TO_TRAINER: tuple[SignalName, ...] = ("SIGKILL", "SIGKILL", "SIGTERM", "SIGINT", "SIGSTOP")
_TO_WORKER: tuple[SignalName, ...] = (
    "SIGKILL",
    "SIGKILL",
    "SIGSTOP",
    "SIGTERM",
    "SIGINT",
)  # the last two have no effect
_ACTIONS: tuple[Action, ...] = ("kill", "kill", "stop", "segv", "exit")


class FaultDrawer:
    """Draws the faults of one run.

    Args:
        num_saves: of the run that the fault is for.
        guard: the trainer calls ``guard()``, without which nothing reaches ``save.overlapped``.
    """

    def __init__(
        self, rng: random.Random, settings: StressSettings, num_saves: int, guard: bool, num_workers: int
    ) -> None:
        self._rng = rng
        self._settings = settings
        self._num_saves = num_saves
        self._guard = guard
        self._num_workers = num_workers

    def draw(self, kind: Kind, state_nbytes: int) -> Fault:
        """Draw one fault of this kind."""
        rng = self._rng
        save = rng.randint(1, self._num_saves)
        draw: dict[Kind, Callable[[], Fault]] = {
            "point": self._draw_point,
            "signal": self._draw_signal,
            "errno": lambda: self._point(rng.choice(STORAGE_POINTS), "errno", rng.choice(ERRNOS)),
            "raise": lambda: self._point(rng.choice(("task.run", *STORAGE_POINTS)), "raise"),
            "slow": lambda: self._point(rng.choice(STORAGE_POINTS), "delay", f"{rng.uniform(0.1, 1.5):.3f}"),
            "full-disk": lambda: FullDisk(save, rng.randint(0, state_nbytes), rng.uniform(0.5, 2.0)),
            "pressure": lambda: Pressure(save, int(rng.uniform(0.25, 1.0) * self._settings.pressure_bytes), 1.0),
            "removed": lambda: RemovePartial(save),
            "damage": self._draw_damage,
        }
        return draw[kind]()

    def _draw_damage(self) -> Damage:
        rng = self._rng
        return Damage(rng.choice(_HOW), rng.random() < 0.7, rng.random(), rng.random())

    def _draw_point(self) -> PointFault:
        """Draw each stage of a save equally often, however many points it has."""
        trainer = TRAINER_POINTS if self._guard else tuple(p for p in TRAINER_POINTS if p != "save.overlapped")
        point = self._rng.choice(self._rng.choice((trainer, LIFE_POINTS, PART_POINTS, COMMIT_POINTS)))
        assert point in trainer or point in WORKER_POINTS
        return self._point(point, self._rng.choice(_ACTIONS))

    def _point(self, point: str, action: Action, detail: str = "") -> PointFault:
        return PointFault(
            point=point,
            action=action,
            after=self._draw_after(point),
            detail=detail,
            relief=self._rng.choice(_RELIEFS),
            pause_secs=self._rng.uniform(0.1, 0.6),
        )

    def _draw_after(self, point: str) -> int:
        """Draw the number of visits before the fault. A process visits most points once for each save and part."""
        if point.startswith("worker."):
            return 0
        per_worker = self._num_saves if point not in COMMIT_POINTS else max(1, self._num_saves // self._num_workers)
        return self._rng.choice((0, self._rng.randrange(per_worker)))

    def _draw_signal(self) -> SignalFault:
        rng = self._rng
        target = rng.choice(_TARGETS)
        return SignalFault(
            target=target,
            signal=rng.choice(_TO_TRAINER if target == "trainer" else _TO_WORKER),
            save=rng.randint(0, self._num_saves),
            delay_secs=rng.choice((0.0, rng.uniform(0, 0.05), rng.uniform(0, 0.5), rng.uniform(0, 3.0))),
            pick=rng.randrange(12),
            relief=rng.choice(_RELIEFS),
            pause_secs=rng.uniform(0.1, 0.6),
        )
