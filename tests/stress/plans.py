"""Episodes written by hand: small states, few saves, chosen faults."""

from __future__ import annotations

from typing import Any

from stager.stress.episode import Episode, RunPlan
from stager.stress.states import LeafSpec
from stager.stress.training import TrainingSpec

LEAVES = (
    LeafSpec("tensor", "bfloat16", 512),
    LeafSpec("tied", "bfloat16", base=0),
    LeafSpec("slice", "bfloat16", base=0),
    LeafSpec("transposed", "bfloat16", base=0),
    LeafSpec("tensor", "complex64", 96, born=3),
    LeafSpec("tensor", "bool", 33, resized=5),
    LeafSpec("scalar", "int64", 1),
    LeafSpec("empty", "uint8"),
    LeafSpec("object", dies=6),
    LeafSpec("custom"),
)


def training(*, optimizer: Any = "adamw", big: int = 1 << 16) -> TrainingSpec:
    """A model of a few thousand parameters, one of each oddity, and one larger tensor of ``big`` bytes."""
    leaves = (*LEAVES, LeafSpec("tensor", "float8_e5m2", big))
    return TrainingSpec(seed=7, width=8, depth=1, tied=True, optimizer=optimizer, leaves=leaves)


def config(num_workers: int = 1, **sections: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """As drawn ones are: short timeouts, any object may be loaded."""
    values: dict[str, dict[str, Any]] = {
        "workers": {"count": num_workers, "nice": 0, "shutdown_timeout_secs": 3.0, "orphan_timeout_secs": 20.0},
        "arena": {"buffers": 2, "max_host_bytes": 1 << 28},
        "staging": {},
        "persistence": {"segment_bytes": 64 << 10},
        "loading": {"allow_pickle": True, "threads": 1, "verify": "full", "verify_first": True},
    }
    for name, section in sections.items():
        values[name].update(section)
    return values


def episode(*runs: RunPlan, number: int = 0, save_every: int = 1, **changes: Any) -> Episode:
    """An episode of these runs."""
    values: dict[str, Any] = {
        "training": training(),
        "config": config(),
        "guard": True,
        "warmup": False,
        "reads_futures": True,
        "step_secs": 0.0,
    }
    return Episode(seed=0, number=number, save_every=save_every, runs=runs, **(values | changes))
