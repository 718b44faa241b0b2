"""Telling what came of each fault, and how long the recovery took."""

from __future__ import annotations

from collections.abc import Iterator

from stager.stress.damage import Damaged
from stager.stress.diary import BegunEntry, CommittedEntry, FailedEntry, ResumedEntry, StagedEntry
from stager.stress.fault_kinds import Damage, Fault, PointFault, SignalFault
from stager.stress.inflictor import Fired
from stager.stress.judge import is_excused_loss, may_fail
from stager.stress.record import FaultOutcome, FaultResult, RunRecord


def outcomes_of(run: RunRecord, violated: bool) -> Iterator[FaultOutcome]:
    """Yield one outcome for each fault of the run's plan."""
    fired = {id(f.fault): f for f in run.fired}
    for fault in run.plan.faults:
        if isinstance(fault, Damage):
            yield _of_damage(run, fault, violated)
        elif id(fault) not in fired:
            yield FaultOutcome(fault, FaultResult.NOT_MET)
        elif violated:
            yield FaultOutcome(fault, FaultResult.VIOLATION)
        else:
            yield _of_fault(run, fired[id(fault)])


def _of_damage(run: RunRecord, fault: Damage, violated: bool) -> FaultOutcome:
    damaged: Damaged | None = run.damaged[0] if run.damaged else None
    if damaged is None:
        return FaultOutcome(fault, FaultResult.NOT_MET)
    if violated:
        return FaultOutcome(fault, FaultResult.VIOLATION)
    resumed = next((e for e in run.diary.entries if isinstance(e, ResumedEntry)), None)
    if resumed is None or not damaged.newest:
        return FaultOutcome(
            fault, FaultResult.COMMITTED, why="an older checkpoint, which verify finds and nobody loads"
        )
    return FaultOutcome(
        fault, FaultResult.FELL_BACK, why=f"{damaged.file} of step {damaged.step}; resumed from {resumed.step}"
    )


def _of_fault(run: RunRecord, fired: Fired) -> FaultOutcome:
    fault = fired.fault
    if may_fail(fired) and _failed_after(run, fired):
        secs = max(entry.time for entry in run.diary.failures) - fired.time
        return FaultOutcome(fault, FaultResult.REPORTED, max(0.0, secs), "until the error was reported")
    if _killed_trainer(run, fired):
        return _of_trainer_death(run, fault)
    in_flight = _in_flight(run, fired.time)
    settled = [
        e.time for e in run.diary.entries if isinstance(e, (CommittedEntry, FailedEntry)) and e.step in in_flight
    ]
    if not in_flight or not settled:
        return FaultOutcome(fault, FaultResult.COMMITTED)
    secs = max(settled) - fired.time
    moved = fired.whom == "worker" and isinstance(fault, (PointFault, SignalFault)) and (fault.is_deadly or fault.stops)
    return FaultOutcome(fault, FaultResult.MOVED if moved else FaultResult.COMMITTED, secs, _why(run, fault))


def _of_trainer_death(run: RunRecord, fault: Fault) -> FaultOutcome:
    open_saves = run.diary.steps(BegunEntry) - run.diary.steps(CommittedEntry) - {f.step for f in run.diary.failures}
    valid = set(run.found.valid) if run.found is not None else set()
    if open_saves & valid:
        why = f"the workers of the dead trainer finished {len(open_saves & valid)} save(s), and ended"
        return FaultOutcome(fault, FaultResult.FINISHED, run.gone_secs, why)
    lost = [step for step in open_saves & run.diary.steps(StagedEntry) if is_excused_loss(run, step)]
    if lost:
        return FaultOutcome(fault, FaultResult.LOST, run.gone_secs, "until the last process had ended")
    outcome = FaultResult.DISCARDED if open_saves else FaultResult.COMMITTED
    return FaultOutcome(fault, outcome, run.gone_secs, "until the last worker of the dead trainer had ended")


def _killed_trainer(run: RunRecord, fired: Fired) -> bool:
    fault = fired.fault
    if run.exitcode == 0 or not isinstance(fault, (PointFault, SignalFault)):
        return False
    if isinstance(fault, SignalFault):
        return fired.whom == "trainer" and (not fault.stops or fault.relief == "kill")
    return fault.of_trainer and (fault.is_deadly or (fault.stops and fault.relief == "kill"))


def _failed_after(run: RunRecord, fired: Fired) -> bool:
    return any(entry.time >= fired.time - 1.0 for entry in run.diary.failures)


def _in_flight(run: RunRecord, when: float) -> set[int]:
    begun = {e.step for e in run.diary.entries if isinstance(e, BegunEntry) and e.time <= when}
    settled = {e.step for e in run.diary.entries if isinstance(e, (CommittedEntry, FailedEntry)) and e.time < when}
    return begun - settled


def _why(run: RunRecord, fault: Fault) -> str:
    if isinstance(fault, PointFault) and fault.stops and not fault.of_trainer:
        return f"a worker stopped at {fault.point}: noticed at its deadline, then its task was moved"
    if isinstance(fault, SignalFault) and fault.stops:
        return f"{fault.label}: until its deadline, or until it went on"
    if isinstance(fault, PointFault) and fault.action == "delay":
        return f"{fault.detail} s at {fault.point}, then the save went on"
    return f"{fault.describe()}: until the saves in flight were committed"
