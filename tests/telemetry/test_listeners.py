"""Listeners: what they get, in which order, and that nothing they do changes a save."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import stager
from stager import (
    Checkpointer,
    CommittedEvent,
    Event,
    FailedEvent,
    FellBackEvent,
    PlannedEvent,
    PrunedEvent,
    SaveEvent,
    SaveState,
    StagedEvent,
    StorageError,
    UnstageableError,
    UsageError,
)
from stager.telemetry import listeners
from stager.telemetry.listeners import Listeners
from tests.faults import Faults
from tests.retention.runs import damage

CONFIG: dict[str, Any] = {"workers": {"count": 1}, "persistence": {"fsync": False}}
STATE = {"x": torch.ones(1000)}


def made(step: int) -> Callable[[], Event]:
    return lambda: PlannedEvent(report=stager.SaveReport(step, SaveState.PLANNED))


def test_a_save_is_planned_staged_written_and_committed_outside_of_the_training_thread(run_dir: Path) -> None:
    events: list[Event] = []
    threads: set[threading.Thread] = set()

    def listener(event: Event) -> None:
        events.append(event)
        threads.add(threading.current_thread())

    with Checkpointer(run_dir, CONFIG, on_event=listener) as ckpt:
        info = ckpt.save(3, STATE).upload_completion.result()
    assert [event.name for event in events] == ["planned", "staged", "written", "committed"]
    assert all(isinstance(event, SaveEvent) and event.step == 3 for event in events)
    planned, staged, written, committed = events
    assert isinstance(planned, PlannedEvent) and planned.report.nbytes == 4000 and planned.report.staged_secs is None
    assert isinstance(staged, StagedEvent) and staged.report.staged_secs is not None
    assert isinstance(written, stager.WrittenEvent) and written.report.synced_secs is not None
    assert written.report.committed_secs is None
    assert isinstance(committed, CommittedEvent) and committed.info == info
    assert len(threads) == 1 and threading.main_thread() not in threads


def test_each_listener_gets_events_in_order_until_it_is_stopped(run_dir: Path) -> None:
    first: list[str] = []
    second: list[str] = []
    with Checkpointer(run_dir, CONFIG) as ckpt:
        arrived = threading.Event()
        stop = ckpt.listen(lambda event: (first.append(event.name), event.name == "committed" and arrived.set()))
        ckpt.save(0, STATE).upload_completion.result()
        arrived.wait()
        stop()
        stop()
        ckpt.listen(lambda event: second.append(event.name))
        ckpt.save(1, STATE)
    assert first == second == ["planned", "staged", "written", "committed"]


@pytest.mark.parametrize("error", [ValueError, SystemExit])
def test_an_error_in_a_listener_is_logged_and_changes_nothing(
    run_dir: Path, caplog: pytest.LogCaptureFixture, error: type[BaseException]
) -> None:
    names: list[str] = []

    def broken(event: Event) -> None:
        raise error("its own fault")

    with Checkpointer(run_dir, CONFIG, on_event=broken) as ckpt:
        ckpt.listen(lambda event: names.append(event.name))
        handles = [ckpt.save(step, STATE) for step in range(2)]
    assert [handle.state for handle in handles] == [SaveState.COMMITTED] * 2
    assert sorted(names) == sorted(["planned", "staged", "written", "committed"] * 2)
    assert caplog.text.count("broken failed with committed") == 2 and "its own fault" in caplog.text


def test_a_listener_that_hangs_holds_up_neither_saves_nor_other_listeners_nor_close(
    run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """close() has no time for it, and returns while it still hangs. It gets nothing more when it goes on."""
    released, hanging = threading.Event(), threading.Event()
    got: list[Event] = []
    committed: list[int] = []

    def hangs(event: Event) -> None:
        got.append(event)
        hanging.set()
        released.wait()

    config = {**CONFIG, "telemetry": {"listen_timeout_secs": 0}}
    ckpt = Checkpointer(run_dir, config, on_event=hangs)
    done = threading.Event()
    ckpt.listen(lambda event: isinstance(event, CommittedEvent) and (committed.append(event.step), done.set()))
    for step in range(3):
        done.clear()
        ckpt.save(step, STATE).upload_completion.result()
        done.wait()
    hanging.wait()
    ckpt.close()
    assert committed == [0, 1, 2] and len(got) == 1
    assert "hangs did not return within 0 s (telemetry.listen_timeout_secs)" in caplog.text
    assert "did not get: 12" in caplog.text  # the one that it hangs in counts
    released.set()
    for one in threading.enumerate():
        if one.name == "stager-listener":
            one.join()
    assert len(got) == 1


def test_close_delivers_what_is_queued(run_dir: Path) -> None:
    """1. the listener is held in the first event. 2. the saves end. 3. close() waits, 4. until the listener goes on."""
    released = threading.Event()
    names: list[str] = []

    def slow(event: Event) -> None:
        released.wait()
        names.append(event.name)

    ckpt = Checkpointer(run_dir, CONFIG, on_event=slow)
    ckpt.save(0, STATE).upload_completion.result()
    assert names == []
    threading.Thread(target=released.set).start()
    ckpt.close()
    assert names == ["planned", "staged", "written", "committed"]


def test_a_failed_save_is_told_with_its_error_also_where_save_itself_raised(run_dir: Path, faults: Faults) -> None:
    failed: list[FailedEvent] = []
    with Checkpointer(run_dir, CONFIG, on_event=lambda e: isinstance(e, FailedEvent) and failed.append(e)) as ckpt:
        faults.arm("part.write", "errno EIO")
        assert isinstance(ckpt.save(1, STATE).upload_completion.exception(), StorageError)
        with pytest.raises(UnstageableError):
            ckpt.save(2, {"x": threading.Lock()})
    assert [(event.step, type(event.error), event.report.state) for event in failed] == [
        (1, StorageError, SaveState.FAILED),
        (2, UnstageableError, SaveState.FAILED),
    ]


def test_a_skipped_save_is_told(run_dir: Path, faults: Faults) -> None:
    names: list[tuple[int, str]] = []

    def listener(event: Event) -> None:
        assert isinstance(event, SaveEvent)
        names.append((event.step, event.name))

    config = {**CONFIG, "arena": {"when_full": "skip"}}
    with Checkpointer(run_dir, config, on_event=listener) as ckpt, faults.hold("part.write") as hold:
        for step in range(3):
            ckpt.save(step, STATE)
        hold.wait()
        hold.release()
    assert [name for step, name in names if step == 2] == ["planned", "skipped"]


def test_a_damaged_checkpoint_that_is_passed_over_is_told_to_a_reader_too(run_dir: Path) -> None:
    with Checkpointer(run_dir, CONFIG) as ckpt:
        for step in (1, 2):
            ckpt.save(step, STATE)
    damage(run_dir, 2)
    events: list[Event] = []
    with Checkpointer(run_dir, CONFIG, read_only=True, on_event=events.append) as reader:
        loaded = reader.load()
    assert loaded is not None and loaded.step == 1
    (event,) = events
    assert isinstance(event, FellBackEvent) and event.step == 1
    assert [one.name for one in event.skipped] == ["step-00000002"]


def test_removed_checkpoints_are_told(run_dir: Path) -> None:
    events: list[Event] = []
    config = {**CONFIG, "retention": {"keep_latest": 1}}
    with Checkpointer(run_dir, config, on_event=lambda e: isinstance(e, PrunedEvent) and events.append(e)) as ckpt:
        for step in (1, 2):
            ckpt.save(step, STATE).upload_completion.result()
        ckpt.prune()
    removed = [step for event in events for step in event.report.steps(stager.PruneFate.REMOVED)]  # type: ignore[attr-defined]  # only pruned events are here
    assert removed == [1]


def test_a_listener_may_look_and_is_refused_what_would_wait_for_it(run_dir: Path) -> None:
    seen: list[object] = []

    def listener(event: Event) -> None:
        if isinstance(event, CommittedEvent):
            seen.append(ckpt.latest())
            for call in (lambda: ckpt.save(9, {}), ckpt.close, ckpt.prune, ckpt.wait_for_staging):
                try:
                    call()
                except UsageError as error:
                    seen.append(str(error))

    with Checkpointer(run_dir, CONFIG, on_event=listener) as ckpt:
        info = ckpt.save(0, STATE).upload_completion.result()
    assert seen[0] == info and len(seen) == 5
    assert all("was called by a listener" in str(text) for text in seen[1:])


def test_a_listener_loads_while_another_save_is_in_flight_and_does_not_wait_for_it(
    run_dir: Path, faults: Faults
) -> None:
    """1. Step 1 is committed. 2. Step 2 is held before its commit. 3. The listener loads, and gets step 1."""
    loaded: list[Any] = []
    has_loaded = threading.Event()
    target = {"x": torch.zeros(1000)}

    def listener(event: Event) -> None:
        if isinstance(event, StagedEvent) and event.step == 2:
            loaded.extend((ckpt.load(), ckpt.load(into=target), ckpt.latest_step()))
            has_loaded.set()

    with Checkpointer(run_dir, CONFIG, on_event=listener) as ckpt:
        ckpt.save(1, STATE).upload_completion.result()  # 1.
        with faults.hold("commit.begin") as held:
            second = ckpt.save(2, STATE)
            held.wait()  # 2.
            assert has_loaded.wait(60)  # 3.
            assert not second.upload_completion.done()
    assert [loaded[0].step, loaded[1].step, loaded[2]] == [1, 1, 1]
    assert torch.equal(target["x"], STATE["x"])


def test_a_listener_of_a_checkpointer_that_is_being_closed_loads_and_is_refused_to_guard(run_dir: Path) -> None:
    """1. The listener is held. 2. close() waits for it, with the lock. 3. The listener goes on."""
    seen: list[object] = []
    closing = threading.Event()
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))])

    def listener(event: Event) -> None:
        if isinstance(event, CommittedEvent):
            closing.wait(60)
            seen.append(ckpt.load().step)  # type: ignore[union-attr]  # there is a checkpoint
            for call in (lambda: ckpt.guard(optimizer), lambda: ckpt.protect(1)):
                with pytest.raises(stager.ClosedError, match="is being closed"):
                    call()
            seen.append([verdict.step for verdict in ckpt.prune(dry_run=True).verdicts])

    ckpt = Checkpointer(run_dir, {**CONFIG, "telemetry": {"listen_timeout_secs": 60}}, on_event=listener)
    ckpt.save(1, STATE).upload_completion.result()
    closing_calls = ckpt._listeners.close

    def close(secs: float) -> None:
        closing.set()
        closing_calls(secs)

    ckpt._listeners.close = close  # type: ignore[method-assign]  # 2.
    ckpt.close()
    assert seen == [1, [1]]


def test_a_listener_guards_protects_and_prunes_dry(run_dir: Path) -> None:
    seen: list[object] = []
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))])

    def listener(event: Event) -> None:
        if isinstance(event, CommittedEvent):
            ckpt.guard(optimizer)
            ckpt.protect(event.step)
            seen.append(ckpt.prune(dry_run=True).dry_run)
            has_ended.set()

    has_ended = threading.Event()
    with Checkpointer(run_dir, CONFIG, on_event=listener) as ckpt:
        ckpt.save(1, STATE).upload_completion.result()
        assert has_ended.wait(60)
    assert seen == [True]


def test_an_event_prints_as_one_short_line(run_dir: Path, faults: Faults) -> None:
    lines: list[str] = []
    config = {**CONFIG, "persistence": {"fsync": False, "on_save_error": "warn"}, "retention": {"keep_latest": 1}}
    with Checkpointer(run_dir, config, on_event=lambda event: lines.append(str(event))) as ckpt:
        for step in (1, 2):
            ckpt.save(step, STATE).upload_completion.result()
        ckpt.prune()
        faults.arm("part.write", "errno EIO")
        ckpt.save(3, STATE).upload_completion.exception()
        damage(run_dir, 2)
        assert ckpt.latest() is None
    assert all(len(line) < 600 and "\n" not in line for line in lines)
    assert lines[0] == "step 1 planned: 4,000 bytes, tensors: 1, objects: 0"
    begins = ("step 1 staged: after ", "step 1 written: after ", "step 1 committed: after ", "step 2 committed: after ")
    for begin in (
        *begins,
        "pruned; removed step 1; bytes freed: ",
        "step 3 failed: StorageError: ",
        "fell back to no checkpoint: step-",
    ):
        assert any(line.startswith(begin) for line in lines), begin


def test_without_a_listener_no_event_is_made() -> None:
    def fail() -> Event:
        raise AssertionError("made")

    Listeners().post(fail)


def test_a_listener_far_behind_loses_events_and_that_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(listeners, "_MOST_QUEUED", 3)
    released, got = threading.Event(), []
    several = Listeners()
    several.add(lambda event: (released.wait(), got.append(event)))
    for step in range(10):
        several.post(made(step))
    released.set()
    several.close(60)
    assert [event.step for event in got] == [0, 1, 2]
    assert caplog.text.count("is 3 events behind") == 1


def test_a_thread_that_had_nothing_to_do_ends_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listeners, "_IDLE_SECS", 0)
    threads: list[threading.Thread] = []
    several = Listeners()
    several.add(lambda event: threads.append(threading.current_thread()))
    for step in range(2):
        several.post(made(step))
        while len(threads) <= step:
            pass
        threads[step].join()
    several.close(60)
    assert threads[0] is not threads[1]


def test_files_that_cannot_be_written_change_nothing(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = {**CONFIG, "telemetry": {"events": "/dev/full", "trace": "/dev/full"}}
    with Checkpointer(run_dir, config) as ckpt:
        assert ckpt.save(0, STATE).upload_completion.result().step == 0
    assert caplog.text.count("FileSink failed with committed") == 2 and "No space left" in caplog.text


def test_scalars_are_flat_numbers_and_leave_out_what_is_not_known(run_dir: Path) -> None:
    with Checkpointer(run_dir, CONFIG) as ckpt:
        handle = ckpt.save(3, STATE)
        handle.upload_completion.result()
        scalars = handle.report.scalars()
        assert {type(value) for value in scalars.values()} == {float}
        assert scalars["checkpoint/num_tensors"] == 1.0 and scalars["checkpoint/committed_secs"] > 0
        assert set(scalars) >= {"checkpoint/blocked_secs", "checkpoint/staged_secs", "checkpoint/written_bytes"}
        assert not {"checkpoint/step", "checkpoint/state"} & set(scalars)
        assert "nbytes" in handle.report.scalars("")
    assert stager.SaveReport(1, SaveState.PLANNED).scalars("a.") == {
        "a.nbytes": 0.0,
        "a.num_tensors": 0.0,
        "a.num_objects": 0.0,
    }
