"""Results that own their buffers: a later stage() cannot change an earlier result, and buffers are used again after it."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from stager.torch_api.staging import BlockingAsyncStager, DefaultStager, StagingOptions
from stager.torch_api.staging.state_dict_stager import StateDictStager


def state(value: float) -> dict[str, Any]:
    return {"w": torch.full((64,), value), "n": [torch.full((3,), value), torch.full((3,), -value)]}


def addresses(staged: dict[str, Any]) -> list[int]:
    return [staged["w"].data_ptr(), staged["n"][0].data_ptr(), staged["n"][1].data_ptr()]


@pytest.mark.parametrize("share_memory", [False, True])
def test_results_alive_are_never_overwritten(share_memory: bool) -> None:
    stager = StateDictStager(share_memory=share_memory, lease=True)
    source = state(0)
    results = []
    for value in range(5):
        source["w"].fill_(value)
        results.append(stager.stage(source))
    assert [result["w"][0].item() for result in results] == [0, 1, 2, 3, 4]
    assert len({address for result in results for address in addresses(result)}) == 15


def test_dropped_results_buffers_are_used_again() -> None:
    stager = StateDictStager(share_memory=True, lease=True)
    staged = stager.stage(state(1))
    before = addresses(staged)
    del staged
    assert addresses(stager.stage(state(2))) == before  # and in the same places


USERS: dict[str, Any] = {
    "tensor": lambda tensor: tensor,
    "view": lambda tensor: tensor[3:5],
    "array": torch.Tensor.numpy,
    "storage": torch.Tensor.untyped_storage,
}


@pytest.mark.parametrize("keep", USERS)
def test_any_user_of_a_buffer_keeps_it(keep: str) -> None:
    stager = StateDictStager(lease=True)
    staged = stager.stage({"w": torch.ones(64)})
    kept = USERS[keep](staged["w"])
    address = staged["w"].data_ptr()
    del staged
    later = stager.stage({"w": torch.zeros(64)})
    assert later["w"].data_ptr() != address
    assert kept is not None


def test_release_ends_a_lease_early() -> None:
    stager = StateDictStager(share_memory=True, lease=True)
    staged = stager.stage(state(1))
    assert stager.release(staged) == 3
    assert stager.release(staged) == 0
    assert sorted(addresses(stager.stage(state(2)))) == sorted(addresses(staged))
    assert staged["w"][0].item() == 2  # what release() allows


def test_release_of_something_else_changes_nothing() -> None:
    stager = StateDictStager(lease=True)
    staged = stager.stage(state(1))
    assert stager.release(state(1)) == 0
    assert not set(addresses(stager.stage(state(2)))) & set(addresses(staged))


def test_release_finds_sparse_and_attribute_tensors() -> None:
    source = torch.ones(2)
    source.extra = torch.zeros(3)
    stager = StateDictStager(lease=True)
    staged = stager.stage([source, torch.eye(3).to_sparse()])
    assert stager.release(staged) == 4


def test_buffers_without_use_are_given_back() -> None:
    stager = StateDictStager(lease=True)
    for size in range(1, 40):  # shapes that never come again
        stager.stage({"w": torch.ones(size)})
    assert len(stager._storages) <= 4


def test_memory_is_bounded_by_results_alive() -> None:
    stager = StateDictStager(share_memory=True, lease=True)
    source = {str(index): torch.ones(256) for index in range(50)}
    alive: list[Any] = []
    for _ in range(20):
        alive = [*alive[-1:], stager.stage(source)]
    assert len(stager._storages) <= 150


def test_results_outlive_close() -> None:
    stager = StateDictStager(share_memory=True, lease=True)
    staged = stager.stage(state(3))
    stager.close()
    del stager
    gc.collect()
    assert staged["w"].tolist() == [3.0] * 64


def test_default_stager_with_leases() -> None:
    with DefaultStager(StagingOptions(False, True, True, False, use_leases=True)) as stager:
        source = state(1)
        first = stager.stage(source).result()
        source["w"].fill_(2)
        second = stager.stage(source).result()
        assert (first["w"][0].item(), second["w"][0].item()) == (1, 2)
        assert stager.release(first) == 3


def test_default_stager_without_leases_overwrites_as_torch_does() -> None:
    with DefaultStager(StagingOptions(False, True, False, False)) as stager:
        source = state(1)
        first = stager.stage(source)
        source["w"].fill_(2)
        stager.stage(source)
        assert first["w"][0].item() == 2
        assert stager.release(first) == 0


def test_cached_blocking_stager_holds_one_set_of_buffers() -> None:
    with BlockingAsyncStager(cache_staged_state_dict=True) as stager:
        places = {tuple(addresses(stager.stage(state(value)))) for value in range(5)}
        assert len(places) == 1


def test_async_stager_keeps_no_lease_of_its_own() -> None:
    with DefaultStager(StagingOptions(False, True, True, False, use_leases=True)) as stager:
        before = addresses(stager.stage(state(1)).result())
        stager.synchronize_staging()
        assert addresses(stager.stage(state(2)).result()) == before
