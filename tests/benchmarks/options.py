"""What the user asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Options:
    """One run of the benchmark.

    Attributes:
        rounds: passes over the peers; each gives one first save and ``saves`` later ones per peer.
        scale: size of the states; 1.0 is the published one.
        saves: later saves per pass, at least 2.
        cases, peers: names; empty for all.
        directory: where checkpoints are written while measuring; a directory is made in it and removed.
        out: where results.json, results.md and the pictures go; None: nowhere.
        seed: of the states' values and of the order of the peers.
        cap_secs: a child takes no further save after this long, once it has one first and two later ones.
        deadline_secs: a child that takes longer is killed, and its row says so.
        memory: also measure memory, in a pass of its own.
        pairs: pairs of stretches (with saves, without) per pass of the training loop.
        stretch_steps: training steps in one stretch; one save is taken in a stretch with saves.
        soak_saves: saves of the soak case.
        alone_secs: how long the trainer's speed with nothing in flight is measured, each time.
    """

    directory: Path
    out: Path | None = None
    rounds: int = 3
    scale: float = 1.0
    saves: int = 4
    cases: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    seed: int = 0
    cap_secs: float = 60.0
    deadline_secs: float = 300.0
    memory: bool = True
    pairs: int = 20
    stretch_steps: int = 4
    soak_saves: int = 2000
    alone_secs: float = 0.5
