"""What a profile shows: a range around save(), and one around the wait before a guarded step."""

from __future__ import annotations

import threading
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from stager import Checkpointer
from stager.saving.saver import Saver
from tests.faults import Faults
from tests.waiting import wait_until_blocked


def names_in(profiled: profile) -> set[str]:
    return {event.key for event in profiled.key_averages() if event.key.startswith("stager")}


def test_save_and_the_wait_of_a_step_are_ranges(run_dir: Path, faults: Faults) -> None:
    """A step that does not wait has no range. 1. the copy is held. 2. a step waits. 3. the copy goes on."""
    parameter = torch.nn.Parameter(torch.ones(100))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    parameter.grad = torch.ones(100)
    with Checkpointer(run_dir, {"workers": {"count": 1}}) as ckpt:
        ckpt.guard(optimizer)
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            ckpt.save(0, {"p": parameter}).staging_completion.result()
            ckpt.wait_for_staging()
            optimizer.step()
        assert names_in(profiled) == {"stager: save"}
        with faults.hold("save.overlapped") as hold:
            ckpt.save(1, {"p": parameter})
            hold.wait()
            step = threading.current_thread()

            def go_on() -> None:
                wait_until_blocked(step, Saver._wait_before_step)
                hold.release()

            going_on = threading.Thread(target=go_on)
            going_on.start()
            with profile(activities=[ProfilerActivity.CPU]) as profiled:
                optimizer.step()
            going_on.join()
        assert names_in(profiled) == {"stager: wait before a guarded step"}
