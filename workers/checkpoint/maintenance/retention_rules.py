"""The rules of retention, and what two of them choose: by metrics and times, which are in the manifests.

A process reads each manifest once, as long as it does not change.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from stager.workers.checkpoint.directory.manifest_file import read_header
from stager.workers.checkpoint.documents.manifest import ManifestHeader
from stager.workers.checkpoint.storage.places import storage_of
from stager.workers.errors import CheckpointNotFoundError, CorruptCheckpointError, StorageError


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
    """Return the steps that ``keep_best`` keeps, and why; and those that are damaged or cannot be read, with their problems.

    Args:
        paths: of the checkpoints, by their steps.
        problem_of: looks at the checkpoint of a step; None: it is valid.
    """
    if rule is None:
        return {}, {}
    headers, damaged = _headers(paths)
    values = {step: header.metrics.get(rule.metric, math.nan) for step, header in headers.items()}
    sign = 1 if rule.mode == "min" else -1
    ranked = sorted((sign * value, -step) for step, value in values.items() if not math.isnan(value))
    best: dict[int, str] = {}
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


def spaced_steps(paths: dict[int, str], secs: float | None) -> tuple[set[int], dict[int, str]]:
    """Return the steps that ``keep_every_secs`` keeps, and those that cannot be read, with their problems.

    What it has kept once, it keeps the next time.
    """
    kept: set[int] = set()
    due = -math.inf
    if secs is None:
        return kept, {}
    headers, damaged = _headers(paths)
    for created, step in sorted((header.created, step) for step, header in headers.items()):
        if created >= due:
            kept.add(step)
            due = created + secs
    return kept, damaged


_known: dict[str, tuple[str, ManifestHeader]] = {}  # path -> save_id, what the manifest says


def _headers(paths: dict[int, str]) -> tuple[dict[int, ManifestHeader], dict[int, str]]:
    """Read what the manifests say of the checkpoints, each once.

    Returns:
        The headers, and the problems of those that cannot be read: whether a rule keeps these, nobody knows.
    """
    found: dict[int, ManifestHeader] = {}
    problems: dict[int, str] = {}
    for step, path in paths.items():
        try:
            head = storage_of(path).head(path)
            if head is None or path not in _known or _known[path][0] != head.save_id:
                header = read_header(path)
                _known[path] = header.save_id, header
            found[step] = _known[path][1]
        except CheckpointNotFoundError:
            pass  # removed just now
        except (CorruptCheckpointError, StorageError) as error:
            problems[step] = str(error)
    for path in _known.keys() - set(paths.values()):
        del _known[path]  # removed, or of another run
    return found, problems
