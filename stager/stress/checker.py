"""The checker: looks at the directory of a run from outside, and reports every violation.

It knows the hash of the true state after each step, the saves that must be there, and the checkpoints that were damaged on
purpose. It trusts nothing that a trainer said about what it wrote. It runs in a process of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from stager import Checkpointer
from stager.stress.digest import digest
from stager.workers.checkpoint.directory.run_directory import committed_steps, read_checkpoint
from stager.workers.checkpoint.documents.names import is_partial, number_in, parse_partial
from stager.workers.checkpoint.read.verify import verify_checkpoint
from stager.workers.checkpoint.storage.posix.run_lock import LOCK_NAME
from stager.workers.errors import StagerError

_QUARANTINED = ".not-a-checkpoint-"


class UnnoticedDamageError(AssertionError):
    """Verification found nothing wrong with a damaged checkpoint."""


@dataclass(frozen=True)
class Expectation:
    """What the directory should hold.

    Attributes:
        digests: hash of the true state, by step.
        required: steps that should have a valid checkpoint. Missing ones are returned, for the judge to judge.
        damaged: steps damaged on purpose, with the save_id of the damaged checkpoint ("" if its manifest is gone). A later
            save may have replaced it, but the damaged one must not verify.
        partials_allowed: partial directories may exist: their processes still run, or nobody has cleaned up yet.
        busy: other processes work in the directory at this moment.
        quarantine_allowed: a save may have quarantined a directory without a manifest that was in its way.
    """

    digests: Sequence[str]
    required: Sequence[int] = ()
    damaged: Mapping[int, str] = field(default_factory=dict)
    partials_allowed: bool = False
    busy: bool = False
    quarantine_allowed: bool = False


@dataclass(frozen=True)
class Found:
    """What the checker found.

    Attributes:
        problems: the violations, one line each.
        valid: steps with a valid checkpoint.
        invalid: steps with an invalid checkpoint, and the first reason.
        partials: names of partial directories.
        missing: required steps without a valid checkpoint.
    """

    problems: tuple[str, ...] = ()
    valid: tuple[int, ...] = ()
    invalid: dict[int, str] = field(default_factory=dict)
    partials: tuple[str, ...] = ()
    missing: tuple[int, ...] = ()


def check_directory(directory: str, expected: Expectation) -> Found:
    """Check names, every byte of every checkpoint, the values in it, and what ``latest()`` returns."""
    names = os.listdir(directory) if os.path.isdir(directory) else []
    partials = sorted(filter(is_partial, names))  # from the same listing, because one may be committed meanwhile
    problems = list(_strangers(names, partials, expected))
    valid: list[int] = []
    invalid: dict[int, str] = {}
    for step in committed_steps(directory):
        wrong = _what_is_wrong(directory, step, expected)
        if wrong is None:
            valid.append(step)
            problems += _untruths(directory, step, expected)
        else:
            invalid[step] = wrong
            if step not in expected.damaged:
                problems.append(f"step {step} is committed and invalid: {wrong}")
    if not expected.busy:
        problems += _wrong_newest(directory, valid)
    return Found(tuple(problems), tuple(valid), invalid, tuple(partials), _missing(expected, valid, invalid))


def _strangers(names: list[str], partials: list[str], expected: Expectation) -> Iterator[str]:
    """Yield a violation for each name that does not belong into the directory."""
    for name in sorted(names):
        if name == LOCK_NAME or (name.startswith("step-") and name[5:].isdigit()):
            continue
        if name in partials:
            if not expected.partials_allowed:
                yield f"{name} (step {number_in(parse_partial(name)[0])}) was not cleaned up"
        elif _QUARANTINED not in name or not expected.quarantine_allowed:
            yield f"{name} does not belong here"


def _what_is_wrong(directory: str, step: int, expected: Expectation) -> str | None:
    """Why the checkpoint of a step is invalid; None if it is valid."""
    path = os.path.join(directory, f"step-{step:08d}")
    result = verify_checkpoint(path, full=True, num_threads=1)
    if not result.ok:
        return result.problems[0]
    try:
        info, _ = read_checkpoint(directory, step)
    except StagerError as error:
        return str(error)
    if info.save_id == expected.damaged.get(step):
        raise UnnoticedDamageError(f"{path} was damaged, and full verification finds nothing wrong with it")
    return None


def _untruths(directory: str, step: int, expected: Expectation) -> Iterator[str]:
    """Yield a violation if a valid checkpoint does not hold the true state of its step."""
    try:
        with Checkpointer(directory, {"loading": {"threads": 1}}, read_only=True) as ckpt:
            loaded = ckpt.load(step, allow_pickle=True)
    except StagerError as error:
        yield f"step {step} verifies but cannot be loaded: {type(error).__name__}: {error}"
        return
    assert loaded is not None
    if step >= len(expected.digests):
        yield f"step {step} is committed, but the run has only {len(expected.digests)} steps"
    elif digest(loaded.state) != expected.digests[step]:
        yield f"step {step} verifies but does not hold the state after step {step}"


def _missing(expected: Expectation, valid: list[int], invalid: dict[int, str]) -> tuple[int, ...]:
    absent = sorted(set(expected.required) - set(valid))
    return tuple(step for step in absent if step not in expected.damaged or step not in invalid)


def _wrong_newest(directory: str, valid: list[int]) -> Iterator[str]:
    with Checkpointer(directory, {"loading": {"threads": 1}}, read_only=True) as ckpt:
        latest = ckpt.latest()
    found = None if latest is None else latest.step
    if found != max(valid, default=None):
        yield f"latest() returns step {found}; the newest valid one is {max(valid, default=None)}"


def run_check(arguments: dict[str, Any]) -> dict[str, Any]:
    """The job ``check`` of the fork server: :class:`Found` as JSON."""
    expected = arguments["expected"]
    expectation = Expectation(**expected | {"damaged": {int(k): v for k, v in expected["damaged"].items()}})
    try:
        found = check_directory(arguments["directory"], expectation)
    except Exception as error:  # noqa: BLE001  (the edge of the process; a check that fails is a finding)
        found = Found((f"the checker failed: {type(error).__name__}: {error}",))
    return asdict(found)


def found_from_json(data: dict[str, Any]) -> Found:
    """Read what :func:`run_check` returned."""
    return Found(
        tuple(data["problems"]),
        tuple(data["valid"]),
        {int(step): reason for step, reason in data["invalid"].items()},
        tuple(data["partials"]),
        tuple(data["missing"]),
    )
