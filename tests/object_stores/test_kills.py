"""SIGKILL while a run saves to an object store: what is visible is whole, what was staged is there, nothing is left."""

from __future__ import annotations

import os
import random
import select
import signal
import threading
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import pytest
import torch

from stager import Checkpointer, verify
from stager.workers.checkpoint.directory.run_directory import list_checkpoints
from tests import fork_server
from tests.crash.aftermath import wait_for_workers_to_end
from tests.crash.nursery import Nursery
from tests.crash.test_trainer_killed import Run
from tests.crash.trainers import value_of
from tests.faults import Faults
from tests.object_stores.proxy import Proxy
from tests.object_stores.test_checkpointer import LEFT, objects, state_of
from tests.states import same

OF_A_SAVE = (
    "part.begin",
    "part.opened",
    "part.write",
    "part.written",
    "part.sync",
    "part.synced",
    "part.receipt",
    "commit.begin",
    "commit.indexed",
    "commit.manifest",
    "objects.decided",
    "commit.replaced",
    "commit.published",
)
OF_A_REMOVAL = (
    "prune.begin",
    "prune.verified",
    "objects.marked",
    "objects.retracted",
    "prune.renamed",
    "prune.removing",
)
EVERY_PART_IS_WRITTEN = OF_A_SAVE[OF_A_SAVE.index("part.receipt") :]
OFTEN = (
    "part.write",
    "part.receipt",
    "commit.manifest",
    "objects.decided",
    "commit.published",
    "objects.marked",
    "prune.removing",
)
"""Points at which something else is in the store than at the one before; ``make long`` has the others."""


def _each(points: Sequence[str]) -> list[Any]:
    return [point if point in OFTEN else pytest.param(point, marks=pytest.mark.long) for point in points]


@pytest.fixture(scope="package")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Nursery:
    return Nursery(fork_server.shared(), tmp_path_factory.mktemp("trainers"))


def committed(run_url: str) -> list[int]:
    """The steps of the checkpoints. Each is whole and has its own values, and nothing else lies in the run."""
    found, skipped = list_checkpoints(run_url)
    assert not skipped, skipped
    with Checkpointer(run_url, read_only=True) as reader:
        for info in found:
            assert verify(info.path).ok
            loaded = reader.load(info.step)
            assert loaded is not None
            for tensor in loaded.state.values():
                assert torch.equal(tensor, torch.full_like(tensor, value_of(info.step)))
    expected = {f"step-{info.step:08d}" for info in found} | {
        f"step-{info.step:08d}.data-{info.save_id}" for info in found
    }
    keys = objects(run_url)
    assert {key.split("/")[0] for key in keys} - {".stager.lock"} == expected
    assert not any(map(LEFT.search, keys))
    return [info.step for info in found]


@pytest.mark.parametrize("point", _each(OF_A_SAVE + OF_A_REMOVAL))
def test_worker_killed_at_each_point_is_replaced_and_the_save_commits(run_url: str, faults: Faults, point: str) -> None:
    with Checkpointer(run_url, config={"workers": {"count": 2}, "retention": {"keep_latest": 1}}) as ckpt:
        ckpt.save(1, state_of(1)).upload_completion.result()
        faults.arm(point, "kill")
        ckpt.save(2, state_of(2)).upload_completion.result()
    assert faults.fired(point)
    with Checkpointer(run_url, config={"retention": {"keep_latest": 1}}) as ckpt:
        loaded = ckpt.load()
        assert loaded is not None and loaded.step == 2 and same(loaded.state, state_of(2))
        ckpt.save(3, state_of(3)).upload_completion.result()
    assert {key.split("/")[0].partition(".data-")[0] for key in objects(run_url)} == {".stager.lock", "step-00000003"}


@pytest.mark.parametrize("point", _each([point for point in OF_A_SAVE if point != "part.sync"]))  # these do not sync
def test_all_killed_at_each_point_of_a_save(run_url: str, faults: Faults, nursery: Nursery, point: str) -> None:
    """As when the host loses power."""
    with (
        faults.hold(point, after=1) as hold,
        nursery.start("tests.crash.trainers:end", run_url, "is signalled") as trainer,
    ):
        assert trainer.read() == "base"
        hold.wait()
        trainer.send_to_all(signal.SIGKILL)
        assert trainer.wait() == -signal.SIGKILL
        hold._holds = False
    wait_for_workers_to_end()
    with Checkpointer(run_url):
        pass
    assert committed(run_url) == ([0, 1] if point in EVERY_PART_IS_WRITTEN else [0])


@pytest.mark.parametrize("point", ["part.begin", "part.written", "commit.manifest", "objects.decided"])
def test_workers_of_a_killed_trainer_finish_its_save_and_the_next_run_waits_for_them(
    run_url: str, faults: Faults, nursery: Nursery, point: str
) -> None:
    seen: list[int] = []

    def next_run() -> None:
        with Checkpointer(run_url) as ckpt:
            seen.extend(info.step for info in ckpt.checkpoints())

    waiting = threading.Thread(target=next_run)
    with (
        faults.hold(point, after=1) as hold,
        nursery.start("tests.crash.trainers:end", run_url, "is signalled") as trainer,
    ):
        assert trainer.read() == "base"
        hold.wait()
        if point != "objects.decided":
            assert trainer.read() == "staged"
        trainer.send(signal.SIGKILL)
        trainer.wait()
        waiting.start()
    waiting.join()
    wait_for_workers_to_end()
    assert seen == [0, 1] == committed(run_url)


# -- at random moments ----------------------------------------------------------------------------------------------


def kill_at_random_moments(proxy: Proxy, far_url: str, nursery: Nursery, seed: int, num_kills: int) -> Counter[str]:
    """Kill one process at a time: worker, trainer, or who recovers. The server is gone for a while, again and again."""
    rng, done = random.Random(seed), Counter[str]()
    while done.total() < num_kills:
        with nursery.start("tests.crash.trainers:save_forever", far_url, 2, 1 << 20) as trainer:
            run = Run(trainer)
            while True:
                run.run_for(rng.uniform(0.0, 0.4))
                what = rng.choice(["trainer", "worker", "server"])
                done[what] += 1
                if what == "trainer" or done.total() >= num_kills:
                    break
                if what == "server":
                    proxy.go_down()
                    run.run_for(rng.uniform(0.0, 0.5))
                    proxy.come_back()
                elif workers := run.workers():
                    with suppress(ProcessLookupError):
                        os.kill(rng.choice(workers), signal.SIGKILL)
                    run.wait_until_recovered()
            trainer.send(signal.SIGKILL)
            assert trainer.wait() == -signal.SIGKILL, trainer.stderr.read_text()
            while run.read(60.0):  # until nobody has its output any more
                pass
        wait_for_workers_to_end()
        if rng.random() < 0.5:
            with nursery.start("tests.object_stores.recovering:recover_once", far_url) as one:
                select.select([one.stdout], [], [], rng.uniform(0.0, 0.3))
                one.send(signal.SIGKILL)
                one.wait()
            done["recovery"] += 1
        with Checkpointer(far_url, config={"retention": {"keep_latest": 1}}) as ckpt:
            ckpt.prune()
        steps = committed(far_url)
        assert max(steps, default=-1) >= run.staged, "a staged checkpoint was lost"
    return done


def test_killed_at_random_moments(proxy: Proxy, far_url: str, nursery: Nursery) -> None:
    kill_at_random_moments(proxy, far_url, nursery, seed=1, num_kills=12)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_killed_at_500_random_moments(proxy: Proxy, far_url: str, nursery: Nursery) -> None:
    print(kill_at_random_moments(proxy, far_url, nursery, seed=2, num_kills=500))
