"""What goes wrong between stager and a server: each row of the table in docs/object-stores.md.

A proxy before a real server makes it happen to one request, or to as many as are named.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stager import Checkpointer, ConfigError, StorageError, load_checkpoint, verify
from stager.workers.checkpoint.storage.objects import client as client_module
from stager.workers.checkpoint.storage.objects.client import client_of
from tests.object_stores.proxy import Fault, Proxy
from tests.object_stores.test_checkpointer import LEFT, objects
from tests.states import same

STRIPE = r"__0_0\.distcp/"
RECEIPT = r"receipt-"
MANIFEST = r"step-00000001/manifest\.json"
DECISION = r"\.stager\.decisions/"


def state_of(step: int) -> dict[str, object]:
    return {"weight": torch.arange(200_000.0) + step, "step": step}


def save_one(far_url: str, step: int = 1) -> None:
    with Checkpointer(far_url) as ckpt:
        ckpt.save(step, state_of(step)).upload_completion.result()


def is_whole(far_url: str, step: int = 1) -> None:
    path = f"{far_url}/step-{step:08d}"
    assert verify(path).ok and same(load_checkpoint(path).state, state_of(step))
    keys = objects(far_url)
    assert not any(map(LEFT.search, keys))


PATHS = [STRIPE, RECEIPT, MANIFEST, DECISION, r"save-0", r"\.data-[0-9a-f]+/manifest"]
WRITE_FAULTS: list[Fault | int] = [Fault.RESET, Fault.RESET_IN_BODY, Fault.LOSE_ANSWER, 500, 503, 429]


def each_with_one(paths: list[str], faults: list[Fault | int]) -> list[Any]:
    """All pairs. Those with which each path and each fault is met once are in the short suite."""
    return [
        pytest.param(path, fault, id=f"{path}-{fault}", marks=() if row == column else (pytest.mark.long,))
        for row, path in enumerate(paths)
        for column, fault in enumerate(faults)
    ]


@pytest.mark.parametrize(("path", "what"), each_with_one(PATHS, WRITE_FAULTS))
def test_a_write_that_fails_is_done_again(proxy: Proxy, far_url: str, path: str, what: Fault | int) -> None:
    rule = proxy.when("PUT", path, what, times=2)
    save_one(far_url)
    assert rule.reached.is_set()
    is_whole(far_url)


@pytest.mark.parametrize("what", [Fault.RESET, Fault.LOSE_ANSWER, 500, 503], ids=str)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_read_that_fails_is_done_again(proxy: Proxy, far_url: str, method: str, what: Fault | int) -> None:
    save_one(far_url)
    proxy.when(method, "", what, times=3, after=1)
    is_whole(far_url)


@pytest.mark.parametrize("what", [Fault.RESET, Fault.LOSE_ANSWER, 503], ids=str)
def test_a_removal_that_fails_is_done_again(proxy: Proxy, far_url: str, what: Fault | int) -> None:
    with Checkpointer(far_url, config={"retention": {"keep_latest": 1}}) as ckpt:
        ckpt.save(1, state_of(1)).upload_completion.result()
        proxy.when("POST", r"\?delete", what, times=2)
        ckpt.save(2, state_of(2)).upload_completion.result()
    is_whole(far_url, 2)
    assert not any(key.startswith("step-00000001") for key in objects(far_url))


def test_slow_bytes_arrive(proxy: Proxy, far_url: str) -> None:
    rule = proxy.when("PUT", STRIPE, Fault.SLOW, times=4)
    save_one(far_url)
    assert rule.reached.is_set()
    is_whole(far_url)


def test_a_server_that_is_gone_for_a_while_delays_the_save(proxy: Proxy, far_url: str) -> None:
    """The trainer goes on meanwhile: the next save is staged, too."""
    with Checkpointer(far_url) as ckpt:
        held = proxy.when("PUT", STRIPE, Fault.HOLD)
        first = ckpt.save(1, state_of(1))
        assert held.reached.wait(60)
        proxy.go_down()
        held.go_on.set()
        second = ckpt.save(2, state_of(2))
        second.staging_completion.result()
        assert not first.upload_completion.done()
        proxy.come_back()
        assert [save.upload_completion.result().step for save in (first, second)] == [1, 2]
    is_whole(far_url, 1)
    is_whole(far_url, 2)


def test_a_store_that_refuses_says_so_and_the_next_save_works(proxy: Proxy, far_url: str) -> None:
    with Checkpointer(far_url) as ckpt:
        ckpt.save(1, state_of(1)).upload_completion.result()
        proxy.when("PUT", STRIPE, 403, times=100)
        failed = ckpt.save(2, state_of(2))
        error = failed.upload_completion.exception()
        assert (
            isinstance(error, StorageError) and "check the credentials" in str(error) and "__0_0.distcp" in str(error)
        )
        proxy.forget()
        ckpt.save(3, state_of(3)).upload_completion.result()
        assert [found.step for found in ckpt.checkpoints()] == [1, 3]
    is_whole(far_url, 3)
    assert not any(key.startswith("step-00000002") for key in objects(far_url))


def test_a_store_that_stays_away_fails_the_save_in_bounded_time(
    proxy: Proxy, far_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(client_module.RETRY_VARIABLE, "1")
    client_of.cache_clear()
    with Checkpointer(far_url) as ckpt:
        ckpt.save(1, state_of(1)).upload_completion.result()
        proxy.go_down()
        error = ckpt.save(2, state_of(2)).upload_completion.exception()
        assert isinstance(error, StorageError)
        proxy.come_back()
        ckpt.save(3, state_of(3)).upload_completion.result()
    is_whole(far_url, 3)


def test_a_conditional_write_that_is_repeated_is_not_taken_for_another_runs(proxy: Proxy, far_url: str) -> None:
    """The answers to the manifest, to the decision and to the lease are lost: the request is repeated, and refused."""
    for path in (MANIFEST, DECISION, r"\.stager\.lock"):
        proxy.when("PUT", path, Fault.LOSE_ANSWER)
    save_one(far_url)
    is_whole(far_url)
    save_one(far_url)  # and when it takes the place of another
    is_whole(far_url)


@pytest.mark.parametrize("code", [409, 412])
def test_a_refused_condition_is_looked_into(proxy: Proxy, far_url: str, code: int) -> None:
    """409: S3 answers so when two conditional writes meet; it may be repeated. 412: somebody else was first, or was not."""
    proxy.when("PUT", MANIFEST, code, times=2)
    save_one(far_url)
    is_whole(far_url)


def test_no_upload_in_parts_is_ever_begun(proxy: Proxy, far_url: str) -> None:
    save_one(far_url)
    assert proxy.count("POST", "uploads") == 0


def test_a_tombstone_whose_answer_is_lost_is_ones_own(proxy: Proxy, far_url: str) -> None:
    """The manifest becomes a tombstone for a moment. The client repeats that write, and is refused."""
    with Checkpointer(far_url) as ckpt:
        for step in (1, 2):
            ckpt.save(step, state_of(step)).upload_completion.result()
        rule = proxy.when("PUT", MANIFEST, Fault.LOSE_ANSWER)
        ckpt.delete(1)
        assert rule.reached.is_set()
        assert [found.step for found in ckpt.checkpoints()] == [2]
    assert not any("step-00000001" in key for key in objects(far_url))
    is_whole(far_url, 2)


def test_a_retry_time_that_is_no_number_is_refused(far_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("soon", "0", "nan", "-1"):
        monkeypatch.setenv(client_module.RETRY_VARIABLE, text)
        client_of.cache_clear()
        with pytest.raises(ConfigError, match=client_module.RETRY_VARIABLE):
            Checkpointer(far_url)


@pytest.mark.parametrize("condition", ["if-none-match", "if-match"])
def test_a_store_that_takes_every_write_is_refused(proxy: Proxy, far_url: str, condition: str) -> None:
    proxy.drops = (condition,)
    for _ in range(2):
        with pytest.raises(StorageError, match=r"takes a write whose condition .* does not hold"):
            Checkpointer(far_url)
    assert objects(far_url) == [".stager.lock"]
    proxy.drops = ()
    with Checkpointer(far_url) as ckpt:
        ckpt.save(1, state_of(1))
    is_whole(far_url, 1)
