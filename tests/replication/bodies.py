"""What the ranks of the tests do."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast
from unittest import mock

import psutil
import pytest
import torch
import torch.distributed as dist

from stager import Checkpointer, RankFailedError, SaveHandle, StorageError
from stager.ranks import keys
from stager.ranks.messages import ReplicaFate, decode
from stager.replication.replicator import Replicator
from stager.saving import directories as opening
from stager.saving import open_here
from tests.faults import Faults, faults_of_this_process
from tests.ranks.bodies import CONFIG, board_of, flip, no_collectives, state_of
from tests.ranks.layouts import Trained, build, differences, whole_state
from tests.replication.opinion import whole_id
from tests.waiting import wait_until, wait_until_blocked

_PATIENCE_SECS = 60.0


def open_run(directory: str, **ranks: Any) -> Checkpointer:
    return Checkpointer(Path(directory, "run"), config(directory, **ranks))


def config(directory: str, **ranks: Any) -> dict[str, Any]:
    memory = Path(directory, "memory")
    memory.mkdir(exist_ok=True)
    return {
        **CONFIG,
        "ranks": {**CONFIG["ranks"], **ranks},
        "replication": {"partners": 1, "directory": str(memory)},
    }


def trained_at(step: int) -> Trained:
    """Another one for each step, the same on all ranks."""
    return build("fsdp", seed=step)


def save(ckpt: Checkpointer, rank: int, step: int) -> SaveHandle:
    return ckpt.save(step, state_of(trained_at(step), rank))


def expect(rank: int, directory: str, steps: int) -> None:
    """Keep what the states of these steps are: another number of ranks would not make the same. Every rank calls it."""
    for step in range(1, steps + 1):
        whole = whole_state(trained_at(step))
        if rank == 0:
            torch.save(whole, Path(directory, f"expected-{step}.pt"))


def expected_at(directory: str, step: int) -> Any:
    return torch.load(Path(directory, f"expected-{step}.pt"))


def await_replicas(ckpt: Checkpointer, handle: SaveHandle) -> None:
    """Until every rank's partner has this save's snapshot."""
    fate = board_of(ckpt).wait(keys.replica_fate(handle.save_id), _PATIENCE_SECS)
    assert fate is not None and decode(fate) == ReplicaFate(is_whole=True), f"the snapshot was not replicated: {fate!r}"


def save_and_die(rank: int, directory: str, steps: int) -> None:
    """The whole job is killed when everything is committed and replicated."""
    expect(rank, directory, steps)
    ckpt = open_run(directory)
    for step in range(1, steps + 1):
        handle = save(ckpt, rank, step)
        handle.upload_completion.result(60)
        await_replicas(ckpt, handle)
    dist.barrier()
    os.kill(os.getpid(), signal.SIGKILL)


def die_before_the_parts_are_written(rank: int, directory: str, victim: int) -> None:
    """Step 1 is committed. Step 2 is staged and replicated, when one rank is killed with its workers, and the others'
    trainers."""
    faults = faults_of_this_process(Path(directory, "faults")) if rank == victim else None
    expect(rank, directory, 2)
    ckpt = open_run(directory)
    save(ckpt, rank, 1).upload_completion.result(60)
    dist.barrier()
    hold = None if faults is None else faults.hold("part.begin")
    handle = save(ckpt, rank, 2)
    handle.staging_completion.result(60)
    await_replicas(ckpt, handle)
    if hold is not None:
        hold.wait()
    dist.barrier()
    if rank == victim:
        for child in psutil.Process().children(recursive=True):
            child.kill()
    os.kill(os.getpid(), signal.SIGKILL)


def outlive_a_host(rank: int, directory: str, victim: int) -> None:
    """As :func:`die_before_the_parts_are_written`, but the others live until the save has failed, and end then."""
    faults = faults_of_this_process(Path(directory, "faults")) if rank == victim else None
    expect(rank, directory, 2)
    with suppress(RankFailedError), open_run(directory, timeout_secs=3) as ckpt:
        save(ckpt, rank, 1).upload_completion.result(60)
        dist.barrier()
        hold = None if faults is None else faults.hold("part.begin")
        handle = save(ckpt, rank, 2)
        await_replicas(ckpt, handle)
        if hold is not None:
            hold.wait()
            for child in psutil.Process().children(recursive=True):
                child.kill()
            os.kill(os.getpid(), signal.SIGKILL)
        handle.upload_completion.result(60)
    os._exit(0)  # as a process that an exception ends


def slow_rank(rank: int, directory: str) -> list[list[str]]:
    """Rank 1's part of step 2 comes too late; step 3 is committed. What is left of failed saves before and after."""
    faults = faults_of_this_process(Path(directory, "faults")) if rank == 1 else None
    with open_run(directory, timeout_secs=3) as ckpt:
        save(ckpt, rank, 1).upload_completion.result(60)
        dist.barrier()
        hold = None if faults is None else faults.hold("part.begin")
        handle = save(ckpt, rank, 2)
        if hold is None:
            assert isinstance(handle.upload_completion.exception(60), RankFailedError)
        dist.barrier()
        if hold is not None:
            hold.wait()
            hold.release()
            assert isinstance(handle.upload_completion.exception(60), RankFailedError)
        dist.barrier()
        before = leftovers(directory)
        save(ckpt, rank, 3).upload_completion.result(60)
    dist.barrier()
    return [before, leftovers(directory)]


def leftovers(directory: str) -> list[str]:
    return [path.name.rpartition("-")[0] for path in Path(directory, "run").glob("step-*.*")]


def resume(rank: int, directory: str, expected_step: int) -> dict[str, Any]:
    """What the next job finds: the step, where its state differs from the one saved then, and what was logged."""
    said = _listen()
    other = build("fsdp", seed=99)
    state = state_of(other, rank)
    with open_run(directory) as ckpt:
        loaded = ckpt.load(into=state)
        steps = [info.step for info in ckpt.checkpoints()]
    step = 0 if loaded is None else loaded.step
    problems = differences(expected_at(directory, expected_step), whole_state(other))
    return {"step": step, "steps": steps, "problems": problems, "said": said, "own": int(state["own"].value["rank"])}


def cannot_resume(rank: int, directory: str) -> str:
    """What is raised on this rank."""
    try:
        open_run(directory).close()
    except StorageError as error:
        return str(error)
    return "opened"


def resume_alone(directory: str, expected_step: int) -> dict[str, Any]:
    """As :func:`resume`, in a process without a process group."""
    said = _listen()
    with open_run(directory) as ckpt:
        loaded = ckpt.load()
    assert loaded is not None
    problems = differences(expected_at(directory, expected_step)["model"], loaded.state["model"])
    return {"step": loaded.step, "problems": problems, "said": said}


def _listen() -> list[str]:
    """Everything that is logged from here on."""
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logging.getLogger("stager").addHandler(Listener(logging.WARNING))
    return said


def run_to_the_end(rank: int, directory: str, *, how: str) -> dict[str, Any]:
    """Three saves; then the run is closed, or an exception leaves its block. What is in memory then."""
    expect(rank, directory, 3)
    said = _listen()
    states = [state_of(trained_at(step), rank) for step in (1, 2, 3)]
    with suppress(ZeroDivisionError), open_run(directory) as ckpt, no_collectives():
        for step, state in enumerate(states, 1):
            handle = ckpt.save(step, state)
        handle.upload_completion.result(60)
        await_replicas(ckpt, handle)
        1 / (how != "exception")
    return {"said": said, "timings": [timing.name for timing in handle.report.timings]}


def close_run(rank: int, directory: str) -> dict[str, Any]:
    return run_to_the_end(rank, directory, how="close")


def fail_run(rank: int, directory: str) -> dict[str, Any]:
    return run_to_the_end(rank, directory, how="exception")


def delete_and_fail(rank: int, directory: str) -> None:
    """Two saves are in memory and committed; one rank deletes the newest, and the run fails."""
    expect(rank, directory, 2)
    states = [state_of(trained_at(step), rank) for step in (1, 2)]
    with suppress(ZeroDivisionError), open_run(directory) as ckpt:
        for step, state in enumerate(states, 1):
            handle = ckpt.save(step, state)
            handle.upload_completion.result(60)
            await_replicas(ckpt, handle)
        dist.barrier()
        if rank == 0:
            ckpt.delete(2)
        dist.barrier()
        raise ZeroDivisionError


def one_cannot_save(rank: int, directory: str, victim: int) -> dict[str, Any]:
    """One rank's second save fails before its snapshot is taken; the third is replicated again."""
    said = _listen()
    faults = faults_of_this_process(Path(directory, "faults")) if rank == victim else None
    with open_run(directory) as ckpt:
        save(ckpt, rank, 1).upload_completion.result(60)
        if faults is not None:
            faults.arm("save.planned", "errno ENOSPC")
            with pytest.raises(OSError, match="No space left"):
                save(ckpt, rank, 2)
        else:
            error = save(ckpt, rank, 2).upload_completion.exception(60)
            assert isinstance(error, RankFailedError)
        handle = save(ckpt, rank, 3)
        handle.upload_completion.result(60)
        await_replicas(ckpt, handle)
    return {"said": said}


def no_memory(rank: int, directory: str) -> dict[str, Any]:
    """The place for replicas is full: everything is committed, and it is said that it was not replicated."""
    said = _listen()
    with open_run(directory) as ckpt:
        steps = [save(ckpt, rank, step).upload_completion.result(60).step for step in (1, 2)]
        wait_until(lambda: len(said) >= 2)
    return {"said": said, "steps": steps}


def partner_dies(rank: int, directory: str, point: str) -> dict[str, Any]:
    """Rank 1 is killed at its ``point``; what the others say of the save that follows. They close."""
    said = _listen()
    faults: Faults | None = faults_of_this_process(Path(directory, "faults")) if rank == 1 else None
    states = [state_of(trained_at(step), rank) for step in (2, 3)]  # with the other rank's help
    ckpt = open_run(directory, timeout_secs=3)
    handle = save(ckpt, rank, 1)
    handle.upload_completion.result(60)
    await_replicas(ckpt, handle)
    dist.barrier()
    if faults is not None:
        faults.arm(point, "kill")
    errors = []
    for step, state in enumerate(states, 2):
        error = ckpt.save(step, state).upload_completion.exception(60)
        errors.append(type(error).__name__)
    with suppress(RankFailedError):
        ckpt.close()
    return {"said": said, "errors": errors}


def saved(ckpt: Checkpointer, rank: int, step: int) -> None:
    handle = save(ckpt, rank, step)
    handle.upload_completion.result(60)
    await_replicas(ckpt, handle)


def turn_back_and_die(rank: int, directory: str) -> None:
    """Three steps; then two of them are removed, the first is loaded on purpose, and step 2 is another one."""
    expect(rank, directory, 1)
    ckpt = open_run(directory)
    for step in (1, 2, 3):
        saved(ckpt, rank, step)
    dist.barrier()
    if rank == 0:
        for step in (2, 3):
            shutil.rmtree(Path(directory, "run", f"step-{step:08d}"))
    dist.barrier()
    state = state_of(build("fsdp", seed=99), rank)
    ckpt.load(step=1, into=state)
    handle = ckpt.save(2, state)
    handle.upload_completion.result(60)
    await_replicas(ckpt, handle)
    dist.barrier()
    os.kill(os.getpid(), signal.SIGKILL)


def load_after_close(rank: int, directory: str) -> Any:
    """The newest checkpoint is damaged when the run is closed already."""
    ckpt = open_run(directory)
    for step in (1, 2):
        saved(ckpt, rank, step)
    ckpt.close()
    dist.barrier()
    if rank == 0:
        flip(Path(directory, "run", "step-00000002", "__1_0.distcp"))
    dist.barrier()
    loaded = ckpt.load(into=state_of(build("fsdp", seed=99), rank))
    return None if loaded is None else loaded.step


def interrupt_closing(rank: int, directory: str) -> bool:
    """Rank 1 does not save again, and rank 0's close() waits for it until somebody presses Ctrl-C. Whether it then waits for
    an exchange of replicas, too."""
    states = [state_of(trained_at(step), rank) for step in (1, 2)]  # with the other rank's help
    ckpt = open_run(directory)
    handle = ckpt.save(1, states[0])
    handle.upload_completion.result(60)
    await_replicas(ckpt, handle)
    waited = False
    if rank == 0:
        handle = ckpt.save(2, states[1])
        handle.staging_completion.result(60)
        said = _listen()
        interrupter = threading.Thread(target=_interrupt_when_blocked_in, args=(Checkpointer.close,))
        interrupter.start()
        with pytest.raises(KeyboardInterrupt):
            ckpt.close()
        interrupter.join()
        waited = any("is not replicated" in text for text in said)
    dist.barrier()
    if rank == 1:
        ckpt.close()
    return waited


def _interrupt_when_blocked_in(function: Callable[..., Any]) -> None:
    wait_until_blocked(threading.main_thread(), function)
    os.kill(os.getpid(), signal.SIGINT)


def next_run_waits_for_the_lock(rank: int, directory: str) -> list[int]:
    """The next run is begun while this one still has the directory, and then closes: what it sees."""
    ckpt = open_run(directory)
    saved(ckpt, rank, 1)
    dist.barrier()
    steps: list[int] = []
    is_waiting = threading.Event()
    take = opening.take_directory

    def take_directory(*args: Any, **options: Any) -> int:
        is_waiting.set()
        return take(*args, **options)

    def run() -> None:
        in_another_process = mock.patch.object(open_here, "take_over", lambda directory: None)
        waits = mock.patch.object(opening, "take_directory", take_directory)
        with in_another_process, waits, open_run(directory) as following:
            steps.extend(info.step for info in following.checkpoints())

    waiting = threading.Thread(target=run)
    waiting.start()
    is_waiting.wait()
    dist.barrier()
    ckpt.close()
    waiting.join()
    return steps


def whole_when_opened(rank: int, directory: str) -> str:
    with open_run(directory) as ckpt:
        replicator = ckpt._run.replication.replicator
        assert isinstance(replicator, Replicator)
        return whole_id(replicator)


def refuse_once(rank: int, directory: str) -> dict[str, Any]:
    """Rank 1 calls save() wrongly, and goes on."""
    error: BaseException | None = None
    with open_run(directory, timeout_secs=3) as ckpt:
        save(ckpt, rank, 1).upload_completion.result(60)
        dist.barrier()
        state = state_of(trained_at(2), rank)
        if rank == 1:
            with pytest.raises(ValueError, match="step must be"):
                ckpt.save(cast(Any, "2"), state)
        else:
            error = ckpt.save(2, state).upload_completion.exception(60)
        dist.barrier()
        whole = []
        for step in (3, 4):
            handle = save(ckpt, rank, step)
            handle.upload_completion.result(60)
            await_replicas(ckpt, handle)
            whole.append(True)
    return {"error": type(error).__name__, "whole": whole}
