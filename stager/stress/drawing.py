"""Drawing episodes: the same seed and number give the same episode on every machine."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from stager.stress.config import Kind, StressConfig, StressSettings, choices
from stager.stress.drawing_faults import FaultDrawer
from stager.stress.episode import Ending, Episode, OnTerm, RunPlan
from stager.stress.fault_kinds import Damage, Fault, FullDisk, PointFault, SignalFault
from stager.stress.states import DTYPES, NEVER, LeafKind, LeafSpec, dtype_of
from stager.stress.training import TrainingSpec

_ENDINGS: tuple[Ending, ...] = ("close", "forget", "exception", "exit", "os-exit")
_ON_TERM: tuple[OnTerm, ...] = ("die", "exit", "save")
_SMALL_DISK_STATE_BYTES = 1 << 20
_VIEWS: tuple[LeafKind, ...] = ("tied", "slice", "transposed", "strided")
_OBJECTS: tuple[LeafKind, ...] = ("object", "text", "set", "custom")


def draw_episode(seed: int, number: int, config: StressConfig, left_out: frozenset[Kind] = frozenset()) -> Episode:
    """Draw episode ``number`` of a run with ``seed``.

    Args:
        left_out: kinds of faults that this host does not allow. They are drawn and then left out, so that the rest of the
            episode is the same on every machine.
    """
    return _Drawer(seed, number, config, left_out).draw()


class _Drawer:
    def __init__(self, seed: int, number: int, config: StressConfig, left_out: frozenset[Kind]) -> None:
        self._seed, self._number = seed, number
        self._config = config
        self._left_out = left_out
        self._rng = random.Random(f"stager stress {seed} {number}")

    @property
    def _settings(self) -> StressSettings:
        return self._config.stress

    def draw(self) -> Episode:
        rng = self._rng
        kinds = self._draw_kinds()
        small_disk = "full-disk" in kinds
        num_saves = self._draw_num_saves(small_disk)
        save_every = rng.choice((1, 1, 2, 3, 5))
        num_steps = num_saves * save_every
        limit = _SMALL_DISK_STATE_BYTES if small_disk or num_saves > 12 else self._settings.max_state_bytes
        training = draw_training(rng, num_steps, limit)
        guard = rng.random() < 0.6
        config = self._draw_config(training)
        runs = self._draw_runs(kinds, num_steps, save_every, guard, training, config["workers"]["count"])
        faults = tuple(fault for run in runs for fault in run.faults)
        if _stops(faults):
            config["workers"] |= self._stopped_workers()
        if any(isinstance(fault, Damage) for fault in faults) and any(
            leaf.born or leaf.resized < num_steps or leaf.dies < num_steps for leaf in training.leaves
        ):
            # The trainer builds the structure of latest(), and falling back would load a checkpoint of another structure.
            config["loading"] |= {"verify": "full", "verify_first": True}
        for section, values in self._config.held().items():
            config.setdefault(section, {}).update(values)
        return Episode(
            seed=self._seed,
            number=self._number,
            training=training,
            save_every=save_every,
            config=config,
            guard=guard,
            warmup=rng.random() < 0.6,
            reads_futures=rng.random() < 0.6,
            step_secs=rng.choice((0.0, 0.0, 0.002, 0.01, 0.03)),
            runs=runs,
            small_disk=small_disk and "full-disk" not in self._left_out,
        )

    def _draw_kinds(self) -> list[Kind]:
        """Draw the kinds of faults, each often enough to occur within a few minutes."""
        count = self._rng.choice((0, 1, 1, 2, 2, 3)) if self._settings.faults else 0
        weights = {"point": 5, "signal": 4, "errno": 3, "damage": 2}
        kinds = self._settings.faults
        drawn = self._rng.choices(kinds, [weights.get(kind, 1) for kind in kinds], k=count) if count else []
        return drawn[: self._settings.max_faults]

    def _draw_num_saves(self, small_disk: bool) -> int:
        most = self._settings.max_saves
        few = self._rng.randint(4, 12)
        if not small_disk and self._rng.random() < 0.1:
            return self._rng.randint(min(20, most), most)
        return min(few, most)

    # -- configuration ------------------------------------------------------------------------------------------

    def _draw_config(self, training: TrainingSpec) -> dict[str, dict[str, Any]]:
        rng = self._rng
        count = min(rng.choice((1, 1, 1, 2, 2, 3)), self._settings.max_workers)
        buffers = rng.choice((2, 2, 3))
        tight = int(training.max_nbytes * 1.5) + (4 << 20)
        config: dict[str, dict[str, Any]] = {
            "workers": {
                "count": count,
                "nice": rng.choice((0, 5)),
                "task_timeout_secs": 60.0,
                "max_restarts": rng.choice((4, 8)),
                "orphan_timeout_secs": 20.0,
                "shutdown_timeout_secs": 3.0,
            },
            "arena": {
                "buffers": buffers,
                "when_full": rng.choice(("wait", "wait", "skip")),
                "prefault": rng.random() < 0.5,
                "max_host_bytes": tight if rng.random() < 0.25 else 1 << 30,
            },
            "staging": {"verify": rng.random() < 0.3, "copy_threads": rng.choice((1, 2))},
            "persistence": {
                "fsync": rng.random() < 0.7,
                "segment_bytes": rng.choice((64 << 10, 256 << 10, 64 << 20)),
                "check_free_space": rng.random() < 0.5,
                "lock_timeout_secs": 30.0,
                "format": rng.choice(choices("persistence", "format") or ("dcp",)),
            },
            "loading": {
                "verify": rng.choice(("full", "quick")),
                "threads": rng.choice((1, 2)),
                "allow_pickle": True,
            },
        }
        if locations := choices("staging", "location"):
            config["staging"]["location"] = rng.choice(locations)
        return config

    def _stopped_workers(self) -> dict[str, Any]:
        """Short deadlines, because a stopped worker is noticed only by its deadline."""
        known = type(self._config.workers).model_fields
        deadlines = {
            "start_timeout_secs": self._settings.start_timeout_secs,
            "task_timeout_secs": self._settings.task_timeout_secs,
            "heartbeat_timeout_secs": self._settings.task_timeout_secs,
        }
        return {key: secs for key, secs in deadlines.items() if key in known}

    # -- runs ---------------------------------------------------------------------------------------------------

    def _draw_runs(
        self, kinds: list[Kind], num_steps: int, save_every: int, guard: bool, training: TrainingSpec, num_workers: int
    ) -> tuple[RunPlan, ...]:
        rng = self._rng
        wanted = 1 + sum(rng.random() < 0.6 for _ in kinds) + (rng.random() < 0.3)
        num_runs = min(wanted, 4, max(1, num_steps // save_every))
        bounds = [*sorted(rng.sample(range(1, num_steps), min(num_runs - 1, num_steps - 1))), num_steps]
        faults: list[list[Fault]] = [[] for _ in bounds]
        for kind in kinds:
            first = 1 if kind == "damage" and len(bounds) > 1 else 0
            place = rng.randrange(first, len(bounds))
            steps = bounds[place] - (bounds[place - 1] if place else 0)
            drawer = FaultDrawer(rng, self._settings, max(1, steps // save_every), guard, num_workers)
            fault = drawer.draw(kind, training.max_nbytes)
            if kind not in self._left_out and _may_join(fault, faults[place]):
                faults[place].append(fault)
        return tuple(
            RunPlan(
                until=until,
                ending=rng.choice(_ENDINGS) if until < num_steps else rng.choice(("close", "close", "forget")),
                on_term=rng.choice(_ON_TERM),
                faults=tuple(faults[place]),
                peek_at=rng.choice((0, 0, 1, 2, 3)),
                hurried=rng.random() < 0.3,
            )
            for place, until in enumerate(bounds)
        )


def _may_join(fault: Fault, others: list[Fault]) -> bool:
    """Keep one fault for each point, and one damage, because a second could spoil the checkpoint to fall back to."""
    if isinstance(fault, PointFault):
        return all(not isinstance(other, PointFault) or other.point != fault.point for other in others)
    if isinstance(fault, (Damage, FullDisk)):
        return all(type(other) is not type(fault) for other in others)
    return True


def _stops(faults: tuple[Fault, ...]) -> bool:
    return any(isinstance(fault, (PointFault, SignalFault)) and fault.stops for fault in faults)


def draw_training(rng: random.Random, num_steps: int, max_nbytes: int) -> TrainingSpec:
    """Draw a training run whose state has at most about ``max_nbytes`` bytes."""
    leaves = _draw_leaves(rng, num_steps, int(max_nbytes * rng.choice((0.02, 0.2, 0.7))))
    return TrainingSpec(
        seed=rng.randrange(1 << 30),
        width=rng.choice((8, 16, 48)),
        depth=rng.choice((1, 2, 4)),
        tied=rng.random() < 0.5,
        optimizer=rng.choice(("adamw", "sgd")),
        leaves=tuple(leaves),
    )


def _draw_leaves(rng: random.Random, num_steps: int, budget: int) -> Iterator[LeafSpec]:
    """Draw a few large tensors or many small ones, and about one of each unusual kind of value."""
    big = rng.random() < 0.5
    count = rng.randint(1, 4) if big else rng.randint(20, 150)
    index = 0
    for _ in range(count):
        dtype = rng.choice(DTYPES)
        nbytes = budget // count // 2 if big else rng.randint(1, max(2, min(4096, budget // count)))
        base = _with_life(rng, num_steps, "tensor", dtype, max(1, nbytes // dtype_of(dtype).itemsize))
        yield base
        base_index, index = index, index + 1
        for kind in _VIEWS:
            if rng.random() < (0.4 if big else 0.03):
                yield LeafSpec(kind, dtype, 0, base_index, base.born, base.dies, base.resized)
                index += 1
    for kind in ("scalar", "empty"):
        if rng.random() < 0.6:
            yield _with_life(rng, num_steps, kind, rng.choice(DTYPES), int(kind == "scalar"))
    for kind in _OBJECTS:
        if rng.random() < 0.5:
            yield _with_life(rng, num_steps, kind, "float32", 0)


def _with_life(rng: random.Random, num_steps: int, kind: LeafKind, dtype: str, numel: int) -> LeafSpec:
    """Draw when a leaf exists: most do from start to end; some appear, disappear or grow."""
    born, dies, resized = 0, NEVER, NEVER
    fate = rng.random()
    if fate < 0.1:
        born = rng.randrange(num_steps)
    elif fate < 0.2:
        dies = rng.randrange(1, num_steps + 1)
    elif fate < 0.3 and kind == "tensor":
        resized = rng.randrange(1, num_steps + 1)
    return LeafSpec(kind, dtype, numel, -1, born, dies, resized)
