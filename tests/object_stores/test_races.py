"""Saves that meet at one name: the latest stays, whatever the order of their requests, and nothing else does."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from stager import DirectoryInUseError, load_checkpoint, recover, verify
from stager.workers.checkpoint.commit.persist import persist_part
from stager.workers.checkpoint.storage.objects import run_lease
from stager.workers.checkpoint.storage.objects.client import client_of, split
from stager.workers.checkpoint.storage.places import storage_of
from stager.workers.checkpoint.write.write_task import WriteTask
from tests.object_stores.proxy import Fault, Proxy
from tests.object_stores.servers import Servers
from tests.object_stores.test_checkpointer import LEFT, objects
from tests.persistence.tasks import make_task


def save_of(run_url: str, number: int, run: str = "0123456789abcdef") -> WriteTask:
    """A save to one name, in one part. ``run``: of which trainer; ``number``: how many it had begun."""
    task = make_task(run_url, {"x": torch.tensor(number)}, step=1, num_parts=1)  # type: ignore[arg-type]  # not a Path
    return replace(task, spec=replace(task.spec, run=run, number=number))


def only(run_url: str, number: int) -> None:
    """The checkpoint is that of this save, and nothing of the others is left."""
    assert verify(f"{run_url}/step-00000001").ok
    state: Any = load_checkpoint(f"{run_url}/step-00000001").state
    assert state["x"] == number
    keys = objects(run_url)
    assert not any(map(LEFT.search, keys)) and len({key.split("/")[0] for key in keys if ".data-" in key}) == 1


def race(run_url: str, rounds: Sequence[int], size: int = 8) -> None:
    for number in rounds:
        numbers = list(range(number * size + 1, (number + 1) * size + 1))
        random.Random(number).shuffle(numbers)
        tasks = [save_of(run_url, one) for one in numbers]
        begin = threading.Barrier(size)

        def commit(task: WriteTask, begin: threading.Barrier = begin) -> None:
            begin.wait()
            assert persist_part(task, 0).committed is not None

        threads = [threading.Thread(target=commit, args=(task,)) for task in tasks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        only(run_url, max(numbers))


def test_two_savers_who_have_both_found_nothing_there(proxy: Proxy, far_url: str) -> None:
    held = proxy.when("PUT", r"step-00000001/manifest\.json", Fault.HOLD)
    first = threading.Thread(target=persist_part, args=(save_of(far_url, 1), 0))
    first.start()
    assert held.reached.wait(60)
    persist_part(save_of(far_url, 2), 0)
    held.go_on.set()
    first.join()
    only(far_url, 2)


def test_savers_of_one_name_at_once(run_url: str) -> None:
    race(run_url, range(4))


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_savers_of_one_name_at_once_200_times(run_url: str) -> None:
    race(run_url, range(200))


def test_a_run_that_has_lost_its_lease_is_told_before_it_commits(run_url: str) -> None:
    """It was stopped for longer than the lease counts. The checkpoint of the run that has the lease now stays."""
    persist_part(save_of(run_url, 1, run="bbbb"), 0)
    lock = storage_of(run_url).lock(run_url, 0, "bbbb")
    try:
        with pytest.raises(DirectoryInUseError, match="another run has taken the lock"):
            persist_part(save_of(run_url, 9, run="aaaa"), 0)
    finally:
        lock.close()
    state: Any = load_checkpoint(f"{run_url}/step-00000001").state
    assert state["x"] == 1


def test_of_two_who_take_the_lease_at_once_one_gets_it(run_url: str) -> None:
    storage, got, refused = storage_of(run_url), list[Any](), list[Any]()
    begin = threading.Barrier(6)

    def take(number: int) -> None:
        begin.wait()
        try:
            got.append(storage.lock(run_url, 0, f"{number:016x}"))
        except DirectoryInUseError as error:
            refused.append(error)

    threads = [threading.Thread(target=take, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1 and len(refused) == 5
    got[0].close()
    storage.lock(run_url, 0, "f" * 16).close()  # it was given back


def test_a_damaged_lease_expires_and_is_taken(run_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client, root = split(run_url)
    client.put(f"{root}/.stager.lock", b'{"nonce": 5}')
    monkeypatch.setattr("stager.workers.checkpoint.storage.objects.run_lease.UNKNOWN_SECS", 0.2)
    storage_of(run_url).lock(run_url, 0, "a" * 16).close()


def of_another_host(run_url: str, secs: float = 0.5, **more: Any) -> None:
    """A lease that a run on another host has taken."""
    client, root = split(run_url)
    record = {"nonce": "b" * 16, "secs": secs, "host": "far", "pid": 7, "boot": "another", "socket": "0" * 16, **more}
    client.put(f"{root}/.stager.lock", json.dumps(record).encode())


@pytest.mark.parametrize("dry_run", [False, True])
def test_recover_waits_for_a_lease_that_a_host_has_left(run_url: str, dry_run: bool) -> None:
    persist_part(save_of(run_url, 1), 0)
    of_another_host(run_url)
    recover(run_url, dry_run=dry_run)


@pytest.mark.parametrize("dry_run", [False, True])
def test_recover_is_refused_as_soon_as_the_lease_is_seen_to_be_renewed(run_url: str, dry_run: bool) -> None:
    persist_part(save_of(run_url, 1), 0)
    of_another_host(run_url, secs=3600.0)
    renewing = threading.Timer(0.7, of_another_host, (run_url, 3600.0), {"beat": 1})
    renewing.start()
    with pytest.raises(DirectoryInUseError, match="process 7 on far"):
        recover(run_url, dry_run=dry_run)
    renewing.join()


def test_one_server_by_two_names_is_one_server(servers: Servers, run_url_of: Any, monkeypatch: Any) -> None:
    run_url = run_url_of(servers.of("ministack"))
    lock = storage_of(run_url).lock(run_url, 0, "a" * 16)
    monkeypatch.setenv("AWS_ENDPOINT_URL", servers.of("ministack").url.replace("127.0.0.1", "localhost") + "/")
    client_of.cache_clear()
    with pytest.raises(DirectoryInUseError):
        storage_of(run_url).lock(run_url, 0, "b" * 16)
    lock.close()


def test_of_ranks_on_several_hosts_the_first_gives_the_lease_back(
    run_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = storage_of(run_url)
    first = storage.lock(run_url, 0, "a" * 16)
    first.share()
    with monkeypatch.context() as on_another_host:
        on_another_host.setattr(run_lease, "_boot", lambda: "another")
        second = storage.lock(run_url, 5, "a" * 16, shared=True)
        second.close()
    assert storage.lock_nonce(run_url) == "a" * 16
    first.close()
    assert storage.lock_nonce(run_url) == ""


def test_a_host_that_was_killed_does_not_free_the_lease_that_another_host_has(
    run_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = storage_of(run_url)
    storage.lock(run_url, 0, "a" * 16).close()
    of_another_host(run_url, secs=1.0, boot=run_lease._boot(), namespace=run_lease._namespace(), spread=True)
    began = time.monotonic()
    storage.lock(run_url, 30, "c" * 16).close()
    assert time.monotonic() - began >= 1.0, "the lease was taken before it had expired"
