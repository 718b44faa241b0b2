"""Was a run as it must be? Compares what was done to it with what was seen of it. No I/O, no processes."""

from __future__ import annotations

import errno
import signal
from collections.abc import Iterator, Sequence

from stager.stress.diary import (
    BegunEntry,
    ClosedEntry,
    CommittedEntry,
    DetachedEntry,
    FailedEntry,
    FinishedEntry,
    ResumedEntry,
    StagedEntry,
    UpEntry,
)
from stager.stress.episode import Episode
from stager.stress.fault_kinds import Fault, FullDisk, PointFault, RemovePartial, SignalFault
from stager.stress.inflictor import Fired
from stager.stress.record import RunRecord

# The pool needs a moment to see a worker's death and to hand its task on; a trainer killed within it takes the task along.
_HAND_ON_SECS = 1.0
_SPARE_FDS = 4
_MIN_SAMPLES = 10
_SIGINT_ENDS = (-signal.SIGINT, 0, 1, 130)


def violations_of(run: RunRecord, episode: Episode, digests: Sequence[str]) -> Iterator[str]:
    """Everything that should not have been, one line each."""
    yield from _end(run)
    yield from _resume(run, digests)
    yield from _failures(run)
    yield from _settled(run)
    yield from _descriptors(run, episode)
    yield from run.peeks
    if run.found is not None:
        yield from run.found.problems
        yield from _partials(run)


# -- the trainer's end ------------------------------------------------------------------------------------------------


def _end(run: RunRecord) -> Iterator[str]:
    if run.exitcode is None:
        yield "the trainer hung and was killed; its stacks are in the log"
    elif run.exitcode not in expected_exitcodes(run):
        yield f"the trainer ended with {run.exitcode}, expected one of {sorted(expected_exitcodes(run))}; see its log"
    for process in run.left:
        yield f"{process} was alive {run.gone_secs:.0f} s after its trainer"


def expected_exitcodes(run: RunRecord) -> set[int]:
    """By the plan, and by what was done to the trainer."""
    codes = {1 if run.plan.ending == "exception" else 0}
    for fired in run.fired:
        fault = fired.fault
        if isinstance(fault, PointFault):
            codes |= {"kill": {-9}, "segv": {-11}, "exit": {3}}.get(fault.action, set())
            if fault.stops and fault.relief == "kill":
                codes.add(-9)
            if fault.action in ("raise", "errno") and may_end_a_recovery(fault):
                codes.add(1)  # the trainer's own commit of what an earlier run left
        elif isinstance(fault, SignalFault) and fired.whom == "trainer":
            codes |= _codes_of(fault, run)
    return codes


def _codes_of(fault: SignalFault, run: RunRecord) -> set[int]:
    if fault.is_deadly or (fault.stops and fault.relief == "kill"):
        return {-9}
    if fault.signal == "SIGINT":
        return set(_SIGINT_ENDS)
    if fault.signal == "SIGTERM":
        return {-15} if run.plan.on_term == "die" else {-15, 0}
    return set()


def died(run: RunRecord) -> bool:
    """Whether the trainer died before its planned end."""
    return not any(isinstance(entry, FinishedEntry) for entry in run.diary.entries)


# -- what it resumed from, and where it got to ------------------------------------------------------------------------


def _resume(run: RunRecord, digests: Sequence[str]) -> Iterator[str]:
    for entry in run.diary.entries:
        if isinstance(entry, ResumedEntry):
            newest = max(set(run.before.valid), default=-1)
            if entry.step < newest:
                yield f"the run resumed from step {entry.step}, although step {newest} had a valid checkpoint"
            if entry.step >= 0 and entry.digest != digests[entry.step]:
                yield f"the checkpoint of step {entry.step} loaded as another state than that after step {entry.step}"
        elif isinstance(entry, FinishedEntry) and entry.digest != digests[entry.step]:
            yield f"the run ended after step {entry.step} with another state than an uninterrupted run"


# -- saves ------------------------------------------------------------------------------------------------------------


def _failures(run: RunRecord) -> Iterator[str]:
    """Yield each failure that no fault can have caused. A fault at a point excuses one save."""
    excuses = [fired for fired in run.fired if may_fail(fired)]
    begun = {entry.step: entry.time for entry in run.diary.entries if isinstance(entry, BegunEntry)}
    for failure in run.diary.failures:
        excuse = next((e for e in excuses if _excuses(e, failure, begun.get(failure.step, 0.0))), None)
        if excuse is None:
            yield f"save of step {failure.step} failed with {failure.error}: {failure.message[:300]}"
        elif not isinstance(excuse.fault, FullDisk):
            excuses.remove(excuse)
        if failure.lost:
            error = f"{failure.error}: {failure.message[:200]}"
            yield f"save of step {failure.step} failed, and neither a call nor close() raised the error: {error}"

    if run.diary.steps(DetachedEntry) and not any(map(_tells_trainer_to_go, run.fired)):
        steps = sorted(run.diary.steps(DetachedEntry))
        yield f"saves of steps {steps} were left to the workers, and nobody told the trainer to go"


def _tells_trainer_to_go(fired: Fired) -> bool:
    return (
        isinstance(fired.fault, SignalFault) and fired.fault.signal in ("SIGINT", "SIGTERM") and fired.whom == "trainer"
    )


def may_end_a_recovery(fault: Fault) -> bool:
    """Whether this fault may hit a new run that commits the unfinished saves of an earlier one."""
    return isinstance(fault, PointFault) and fault.point.startswith("commit.")


def may_fail(fired: Fired) -> bool:
    """Whether this fault may make a save fail."""
    fault = fired.fault
    if isinstance(fault, PointFault):
        return fault.action in ("raise", "errno")
    return isinstance(fault, (FullDisk, RemovePartial))


def _excuses(fired: Fired, failure: FailedEntry, begun: float) -> bool:
    fault = fired.fault
    if isinstance(fault, PointFault) and fault.action == "errno":
        return failure.error == "StorageError" and failure.errno == getattr(errno, fault.detail)
    if isinstance(fault, PointFault):
        return failure.error == "RuntimeError"
    if isinstance(fault, RemovePartial):
        return failure.error == "StorageError" and failure.errno == errno.ENOENT
    in_time = fired.over is None or begun <= fired.over
    return failure.error == "StorageError" and failure.errno == errno.ENOSPC and in_time


def _settled(run: RunRecord) -> Iterator[str]:
    """Yield each staged or committed save that is missing, and each save without an answer in a run that was closed."""
    diary = run.diary
    answered = diary.steps(CommittedEntry) | diary.steps(DetachedEntry) | {f.step for f in diary.failures}
    missing = set(run.found.missing) if run.found is not None else set()
    for step in sorted(missing & diary.steps(CommittedEntry)):
        yield f"step {step} was reported as committed, but has no valid checkpoint"
    for step in sorted((missing & diary.steps(StagedEntry)) - (answered - diary.steps(DetachedEntry))):
        if not is_excused_loss(run, step):
            yield f"step {step} was staged and did not fail, but has no valid checkpoint"
    for step in sorted(missing - diary.steps(StagedEntry) - diary.steps(CommittedEntry)):
        yield f"the checkpoint of step {step}, which an earlier run had committed, is gone"
    if any(isinstance(entry, ClosedEntry) for entry in diary.entries):
        for step in sorted(diary.steps(StagedEntry) - answered):
            yield f"step {step} was staged, and after close() it is neither committed nor failed"


def is_excused_loss(run: RunRecord, step: int) -> bool:
    """Whether a staged save may be missing.

    It may if a fault made it fail when no trainer was alive to be told, or if the trainer and the worker that had its task
    were both killed.
    """
    if not died(run) and run.plan.ending in ("close", "forget"):
        return run.plan.ending == "forget" and any(map(may_fail, run.fired))
    if any(map(may_fail, run.fired)):
        return True
    return any(_killed_worker(fired) and _after(fired) > run.ended - _HAND_ON_SECS for fired in run.fired)


def _after(fired: Fired) -> float:
    return fired.time if fired.over is None else fired.over


def _killed_worker(fired: Fired) -> bool:
    fault = fired.fault
    if fired.whom != "worker" or not isinstance(fault, (PointFault, SignalFault)):
        return False
    return fault.is_deadly or (fault.stops and fault.relief == "kill" and fired.over is not None)


# -- leaks ------------------------------------------------------------------------------------------------------------


def _descriptors(run: RunRecord, episode: Episode) -> Iterator[str]:
    before = next((entry.num_fds for entry in run.diary.entries if isinstance(entry, UpEntry)), None)
    for entry in run.diary.entries:
        if isinstance(entry, ClosedEntry) and before is not None and entry.num_fds > before:
            yield f"the trainer had {before} descriptors open before it used stager, and {entry.num_fds} after close()"
    samples: dict[int, list[int]] = {}
    for entry in run.diary.entries:
        if isinstance(entry, BegunEntry):
            for pid, count in entry.fds.items():
                samples.setdefault(pid, []).append(count)
    allowed = _SPARE_FDS + 2 * int(episode.config["arena"]["buffers"])
    for pid, counts in samples.items():
        early = counts[len(counts) // 3]
        if len(counts) >= _MIN_SAMPLES and counts[-1] > early + allowed:
            yield f"process {pid} had {early} descriptors after a third of its saves, {counts[-1]} at the last one"


def _partials(run: RunRecord) -> Iterator[str]:
    """Yield each partial directory of an earlier run that is still there. Making a Checkpointer should clean them up."""
    is_up = any(isinstance(entry, UpEntry) for entry in run.diary.entries)
    if run.found is None or not is_up or any(map(may_fail, run.fired)):
        return
    for name in sorted(set(run.found.partials) & set(run.before.partials)):
        yield f"{name} was left by an earlier run, and this run did not clean it up"
