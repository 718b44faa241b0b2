"""The rules of retention, and what two of them choose: by metrics and times, which are in the manifests.

A process reads each manifest once, as long as it does not change.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from stager.workers.checkpoint.directory.manifest_file import read_header
from stager.workers.checkpoint.documents.manifest import MANIFEST_NAME, ManifestHeader
from stager.workers.errors import CorruptCheckpointError


@dataclass(frozen=True, slots=True)
class KeepBest:
    """Keep the checkpoints whose metric is the best. Of equal ones, the later steps are better.

    A checkpoint without the metric, or for which it is NaN, is never one of the best. As long as no valid checkpoint has the
    metric, the rule removes nothing.

    Attributes:
        metric: its name, as in ``save(step, state, metrics={...})``.
        mode: "min": the lowest is the best; "max": the highest.
        count: keep so many.
    """

    metric: str
    mode: Literal["min", "max"] = "min"
    count: int = 1


@dataclass(frozen=True, slots=True)
class RetentionRules:
    """Which checkpoints to keep.

    Attributes:
        keep_latest: keep so many of the newest; None: no such rule.
        keep_every: keep the steps that it divides; None: no such rule. The newest stays as well.
        protected: keep these steps, in addition to those of :mod:`stager.workers.checkpoint.directory.protected`.
        full: hash the newest before any other is removed; otherwise check its names and sizes.
        num_threads: threads that hash; None: one per usable core, at most 8.
        keep_best: keep the best by a metric; None: no such rule. The newest stays as well.
        keep_every_secs: keep the oldest, and from there on the first of each so many seconds; None: no such rule.
    """

    keep_latest: int | None = None
    keep_every: int | None = None
    protected: frozenset[int] = frozenset()
    full: bool = True
    num_threads: int | None = None
    keep_best: KeepBest | None = None
    keep_every_secs: float | None = None

    @property
    def keep_all(self) -> bool:
        """Whether there is no rule, so that all stay."""
        return not self._reads and self.keep_latest is None and self.keep_every is None

    @property
    def _reads(self) -> bool:
        return self.keep_best is not None or self.keep_every_secs is not None


def best_steps(
    paths: dict[int, str], rule: KeepBest | None, problem_of: Callable[[int], str | None]
) -> tuple[dict[int, str], dict[int, str]]:
    """Return the steps that ``keep_best`` keeps, and why; and those that are damaged, with their problems.

    Args:
        paths: of the checkpoints, by their steps.
        problem_of: looks at the checkpoint of a step; None: it is valid.
    """
    if rule is None:
        return {}, {}
    values = {step: header.metrics.get(rule.metric, math.nan) for step, header in _headers(paths).items()}
    sign = 1 if rule.mode == "min" else -1
    ranked = sorted((sign * value, -step) for step, value in values.items() if not math.isnan(value))
    best: dict[int, str] = {}
    damaged: dict[int, str] = {}
    for _, negative in ranked:
        if len(best) == rule.count:
            break
        step = -negative
        problem = problem_of(step)
        if problem is None:
            best[step] = f"one of the best {rule.count}: {rule.metric} is {values[step]:g}"
        else:
            damaged[step] = problem
    return best, damaged


def spaced_steps(paths: dict[int, str], secs: float | None) -> set[int]:
    """Return the steps that ``keep_every_secs`` keeps: what it has kept once, it keeps the next time."""
    kept: set[int] = set()
    due = -math.inf
    if secs is not None:
        for created, step in sorted((header.created, step) for step, header in _headers(paths).items()):
            if created >= due:
                kept.add(step)
                due = created + secs
    return kept


_known: dict[str, tuple[tuple[int, ...], ManifestHeader]] = {}  # path -> identity of the manifest, what it says


def _headers(paths: dict[int, str]) -> dict[int, ManifestHeader]:
    """Read what the manifests say of the checkpoints. Those without a readable one are left out."""
    found = {}
    for step, path in paths.items():
        with suppress(OSError, CorruptCheckpointError):
            stat = os.lstat(os.path.join(path, MANIFEST_NAME))
            identity = stat.st_ino, stat.st_mtime_ns, stat.st_size
            if path not in _known or _known[path][0] != identity:
                _known[path] = identity, read_header(path)
            found[step] = _known[path][1]
    for path in _known.keys() - set(paths.values()):
        del _known[path]  # removed, or of another run
    return found
