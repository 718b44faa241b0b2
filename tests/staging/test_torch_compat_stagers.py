"""``DefaultStager``, ``BlockingAsyncStager`` and ``ReplicationStager``, as ``test_torch_compat.py`` does it."""

from __future__ import annotations

import dataclasses
import pickle
from concurrent.futures import Future
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint.staging as torch_staging

import stager.torch_api.staging
import stager.torch_api.staging.state_dict_stager
from tests.staging.aliases import views
from tests.staging.compare import assert_private_copy


class TestDefaultStager:
    def test_blocking_stage_returns_the_copy(self, api: Any) -> None:
        stager_ = api.DefaultStager(api.StagingOptions(False, False, False, False))
        source = views()
        assert_private_copy(source, stager_.stage(source))
        stager_.synchronize_staging()
        stager_.close()

    def test_async_stage_returns_a_future(self, api: Any) -> None:
        stager_ = api.DefaultStager(api.StagingOptions(False, True, True, False))
        source = views()
        future = stager_.stage(source)
        assert isinstance(future, Future)
        stager_.synchronize_staging()
        assert_private_copy(source, future.result())
        stager_.close()

    def test_experimental_call_shape(self, api: Any) -> None:
        stager_ = api.ExperimentalStager(config=api.CheckpointStagerConfig(False, False, True, False))
        assert isinstance(stager_, api.CheckpointStager)
        source = views()
        assert_private_copy(source, stager_.stage(source).result())
        stager_.close()

    def test_either_class_of_options_will_do(self, api: Any) -> None:
        for options in (
            api.StagingOptions(False, False, False, False),
            api.CheckpointStagerConfig(False, False, False, False),
        ):
            stager_ = api.DefaultStager(options)
            assert stager_.stage({"w": torch.ones(2)})["w"].tolist() == [1, 1]
            stager_.close()

    def test_defaults_of_options_are_torchs(self, api: Any) -> None:
        for options in (api.StagingOptions(), api.CheckpointStagerConfig()):
            fields = dataclasses.asdict(options)
            assert [
                fields[name]
                for name in ("use_pinned_memory", "use_shared_memory", "use_async_staging", "use_non_blocking_copy")
            ] == [True] * 4

    @pytest.mark.usefixtures("no_accelerator")
    def test_non_blocking_copy_needs_an_accelerator(self, api: Any) -> None:
        with pytest.raises(AssertionError, match="accelerator"):
            api.DefaultStager(api.StagingOptions(False, False, False, True))

    @pytest.mark.usefixtures("no_accelerator")
    def test_without_options(self, api: Any) -> None:
        if api.is_torch:
            with pytest.warns(UserWarning), pytest.raises(AssertionError):
                api.DefaultStager()
        else:
            with api.DefaultStager() as stager_:
                assert stager_.stage({"w": torch.ones(2)})["w"].tolist() == [1, 1]

    def test_used_after_close(self, api: Any) -> None:
        stager_ = api.DefaultStager(api.StagingOptions(False, False, True, False))
        stager_.close()
        with pytest.raises(RuntimeError) as caught:
            stager_.stage({"w": torch.ones(2)})
        assert ("DefaultStager.stage()" in str(caught.value)) is not api.is_torch

    def test_failure_reaches_the_future_and_the_next_stage_works(self, api: Any) -> None:
        stager_ = api.DefaultStager(api.StagingOptions(False, False, True, False))
        with pytest.raises(TypeError):
            stager_.stage({"module": pickle}).result()
        assert stager_.stage({"w": torch.ones(2)}).result()["w"].tolist() == [1, 1]
        stager_.close()

    def test_is_torchs_async_stager(self, api: Any) -> None:
        stager_ = api.DefaultStager(api.StagingOptions(False, False, False, False))
        for protocol in (torch_staging.AsyncStager, stager.torch_api.staging.AsyncStager):
            assert isinstance(stager_, protocol)
            assert isinstance(api.BlockingAsyncStager(), protocol)
            assert not isinstance(object(), protocol)
        assert stager_.should_synchronize_after_execute is True
        assert api.BlockingAsyncStager().should_synchronize_after_execute is False
        stager_.close()


class TestBlockingAsyncStager:
    def test_copies(self, api: Any) -> None:
        source = {"w": torch.randn(3, 4), "n": {"b": torch.arange(3), "step": 4}, "list": [torch.ones(2), "x"]}
        stager_ = api.BlockingAsyncStager()
        staged = stager_.stage(source)
        assert_private_copy(source, staged)
        stager_.synchronize_staging()
        stager_.close()

    def test_cached(self, api: Any) -> None:
        source = {"w": torch.ones(3), "step": 1}
        stager_ = api.BlockingAsyncStager(cache_staged_state_dict=True)
        if api.is_torch:
            with pytest.raises(RuntimeError, match=r"(?i)pin|cuda|accelerator|nvidia"):
                stager_.stage(source)
            return
        first = stager_.stage(source)
        address = first["w"].data_ptr()
        source["w"] = torch.full((3,), 2.0)  # a new tensor, as a state_dict() that builds its tensors gives
        second = stager_.stage(source)
        assert second["w"].data_ptr() == address
        assert second["w"].tolist() == [2, 2, 2]
        assert stager_.stage({"w": torch.ones(9), "new": torch.ones(3)})["new"].tolist() == [1, 1, 1]
        stager_.close()

    def test_type_check(self, api: Any) -> None:
        with pytest.raises(ValueError, match="type"):
            api.BlockingAsyncStager(type_check=True).stage({"odd": {1, 2}})
        assert api.BlockingAsyncStager(type_check=False).stage({"odd": {1, 2}}) == {"odd": {1, 2}}


def test_replication_stager_without_a_process_group_returns_its_argument(api: Any, tmp_path: Any) -> None:
    stager_ = api.ReplicationStager(None, storage_dir=str(tmp_path))
    source = {"w": torch.ones(2)}
    assert stager_.stage(source) is source
    assert stager_._get_persisted_path(0, 1) == str(tmp_path / "rank_0_replica_partner_1.pt")
    stager_._persist_state_dict(source, 0, 1)
    assert torch.equal(torch.load(tmp_path / "rank_0_replica_partner_1.pt")["w"], source["w"])
    assert [path.name for path in tmp_path.iterdir()] == ["rank_0_replica_partner_1.pt"]
    stager_.close()
