"""One set of expectations, run against torch's classes and against stager's.

Where torch falls short a test says so in the branch ``if api.is_torch``: those branches fail on the day torch is mended.
"""

from __future__ import annotations

import collections
import dataclasses
import gc
import inspect
import pickle
import weakref
from concurrent.futures import Future
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint._experimental.staging as torch_experimental
import torch.distributed.checkpoint._state_dict_stager as torch_stager
import torch.distributed.checkpoint.staging as torch_staging

import stager.staging
import stager.staging.state_dict_stager
from tests.staging.compare import assert_private_copy

TORCH = SimpleNamespace(
    is_torch=True,
    StateDictStager=torch_stager.StateDictStager,
    AsyncStager=torch_staging.AsyncStager,
    StagingOptions=torch_staging.StagingOptions,
    DefaultStager=torch_staging.DefaultStager,
    BlockingAsyncStager=torch_staging.BlockingAsyncStager,
    ReplicationStager=torch_staging._ReplicationStager,
    CheckpointStager=torch_experimental.CheckpointStager,
    CheckpointStagerConfig=torch_experimental.CheckpointStagerConfig,
    ExperimentalStager=torch_experimental.DefaultStager,
)
STAGER = SimpleNamespace(
    is_torch=False,
    StateDictStager=stager.staging.state_dict_stager.StateDictStager,
    AsyncStager=stager.staging.AsyncStager,
    StagingOptions=stager.staging.StagingOptions,
    DefaultStager=stager.staging.DefaultStager,
    BlockingAsyncStager=stager.staging.BlockingAsyncStager,
    ReplicationStager=stager.staging._ReplicationStager,
    CheckpointStager=stager.staging.CheckpointStager,
    CheckpointStagerConfig=stager.staging.CheckpointStagerConfig,
    ExperimentalStager=stager.staging.DefaultStager,
)


@pytest.fixture(params=[TORCH, STAGER], ids=["torch", "stager"])
def api(request: pytest.FixtureRequest) -> Any:
    return request.param


@dataclass
class Inner:
    tensor: torch.Tensor
    value: int = 42


@dataclass
class Outer:
    name: str
    inner: Inner
    numbers: list[float]


@dataclass(frozen=True)
class Frozen:
    tensor: torch.Tensor


def views() -> dict[str, Any]:
    base = torch.randn(10, 10)
    return {
        "base": base,
        "flat": base.view(100),
        "slice": base[2:8, 2:8],
        "transposed": base.t(),
        "nested": {"column": base[:, 3], "tail": base.view(100)[10:60]},
        "expanded": torch.randn(1, 4).expand(3, 4),
        "other": [torch.arange(6), (torch.zeros(0, 3), torch.tensor(2.5))],
    }


class TestStateDictStager:
    def test_signatures_are_torchs(self, api: Any) -> None:
        for name in (
            "__init__",
            "stage",
            "deepcopy_with_tensor_offload",
            "_offload_tensor",
            "_stage_untyped_storage",
            "_keep_alive",
            "close",
        ):
            theirs = inspect.signature(getattr(TORCH.StateDictStager, name)).parameters
            ours = inspect.signature(getattr(api.StateDictStager, name)).parameters
            assert list(ours)[: len(theirs)] == list(theirs), name
            assert all(ours[key].default in (theirs[key].default, None) for key in theirs), name

    def test_views_of_one_storage_stay_views_of_one_storage(self, api: Any) -> None:
        source = views()
        staged = api.StateDictStager().stage(source)
        assert_private_copy(source, staged)
        staged["base"].fill_(7)
        assert bool((staged["nested"]["tail"] == 7).all())

    @pytest.mark.parametrize("share_memory", [False, True])
    def test_second_stage_reuses_the_buffers(self, api: Any, share_memory: bool) -> None:
        source = {"w": torch.ones(4), "b": torch.ones(2)}
        stager_ = api.StateDictStager(share_memory=share_memory)
        first = stager_.stage(source)
        source["w"].fill_(5)
        second = stager_.stage(source)
        assert len(stager_._cached_storage_mapping) == 2
        assert second["w"].data_ptr() == first["w"].data_ptr()
        assert first["w"].tolist() == [5] * 4  # torch's semantics, documented: the first result changes

    def test_cache_forgets_sources_that_died(self, api: Any) -> None:
        stager_ = api.StateDictStager()
        source = {"w": torch.ones(4)}
        stager_.stage(source)
        assert len(stager_._cached_storage_mapping) == 1
        del source
        gc.collect()
        assert len(stager_._cached_storage_mapping) == 0

    def test_cache_survives_a_source_that_was_resized_in_place(self, api: Any) -> None:
        source = torch.ones(4)
        stager_ = api.StateDictStager()
        stager_.stage(source)
        source.resize_(64).fill_(3)
        if api.is_torch:
            with pytest.raises(AssertionError, match="Cached storage size"):
                stager_.stage(source)
        else:
            assert torch.equal(stager_.stage(source), source)

    @pytest.mark.parametrize("share_memory", [False, True])
    def test_share_memory_decides_is_shared(self, api: Any, share_memory: bool) -> None:
        source = {"small": torch.ones(4), "large": torch.ones(1 << 19)}
        staged = api.StateDictStager(share_memory=share_memory).stage(source)
        for tensor in staged.values():
            assert tensor.is_shared() is share_memory
            assert tensor.untyped_storage().is_shared() is share_memory

    def test_dataclasses_are_copied_with_their_tensors(self, api: Any) -> None:
        source = {"outer": Outer("n", Inner(torch.randn(3)), [1.0]), "frozen": Frozen(torch.randn(2))}
        assert_private_copy(source, api.StateDictStager().stage(source))

    def test_tensor_attributes_survive(self, api: Any) -> None:
        source = torch.randn(3)
        source.tag, source.partner = "x", torch.arange(2)
        staged = api.StateDictStager().stage({"w": source})["w"]
        assert staged.tag == "x"
        assert torch.equal(staged.partner, source.partner)
        assert staged.partner.data_ptr() != source.partner.data_ptr()

    @pytest.mark.parametrize(
        "dtype",
        [torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.complex64, torch.bool, torch.int8, torch.uint16],
    )
    def test_dtypes_are_exact(self, api: Any, dtype: torch.dtype) -> None:
        source = {"w": (torch.arange(8) % 2).to(dtype)}
        assert_private_copy(source, api.StateDictStager().stage(source))

    def test_pin_memory_without_cuda_warns_and_goes_on(self, api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.warns(UserWarning, match="pin"):
            stager_ = api.StateDictStager(pin_memory=True)
        assert stager_.pin_memory is False
        assert stager_.stage(torch.ones(2)).tolist() == [1, 1]

    def test_deepcopy_takes_a_memo(self, api: Any) -> None:
        shared = torch.ones(3)
        memo: dict[int, Any] = {}
        stager_ = api.StateDictStager()
        one = stager_.deepcopy_with_tensor_offload([shared], memo)
        other = stager_.deepcopy_with_tensor_offload({"t": shared}, memo)
        assert other["t"] is one[0]

    def test_subclass_that_stages_storages_its_own_way(self, api: Any) -> None:
        class Recording(api.StateDictStager):
            def _stage_untyped_storage(self, storage: Any, non_blocking: bool = False) -> Any:
                sizes.append(storage.nbytes())
                return super()._stage_untyped_storage(storage, non_blocking)

        sizes: list[int] = []
        Recording().stage({"a": torch.ones(2), "b": torch.ones(3)})
        assert sizes == [8, 12]

    def test_close_then_stage_again(self, api: Any) -> None:
        stager_ = api.StateDictStager()
        source = {"w": [torch.ones(2)]}
        stager_.stage(source)
        stager_.close()
        assert len(stager_._cached_storage_mapping) == 0
        if api.is_torch:  # close() empties its table of copiers
            with pytest.raises((KeyError, RuntimeError, AttributeError, TypeError)):
                stager_.stage({"w": type})
        else:
            assert_private_copy(source, stager_.stage(source))

    def test_freed_without_the_garbage_collector(self, api: Any) -> None:
        stager_ = api.StateDictStager()
        stager_.stage({"w": torch.ones(2), "l": [1, (2,)]})
        died = weakref.ref(stager_)
        gc.disable()
        try:
            del stager_
            assert (died() is None) is not api.is_torch  # torch: closures per instance refer back to it
        finally:
            gc.enable()
            gc.collect()

    def test_conjugate_and_negative_views_keep_their_values(self, api: Any) -> None:
        source = {"conj": torch.tensor([1 + 2j]).conj(), "neg": torch.tensor([1 + 2j]).conj().imag}
        staged = api.StateDictStager().stage(source)
        if api.is_torch:
            assert staged["conj"].tolist() == [1 + 2j]  # wrong, and silently so
            assert staged["neg"].tolist() == [2.0]
        else:
            assert_private_copy(source, staged)
            assert staged["conj"].tolist() == [1 - 2j]
            assert staged["neg"].tolist() == [-2.0]

    def test_parameter_stays_a_parameter(self, api: Any) -> None:
        staged = api.StateDictStager().stage({"p": torch.nn.Parameter(torch.ones(2))})["p"]
        if api.is_torch:
            assert type(staged) is torch.Tensor  # and so a staged module's parameters are none
        else:
            assert type(staged) is torch.nn.Parameter
            assert staged.requires_grad

    def test_tensor_that_requires_grad(self, api: Any) -> None:
        source = {"leaf": torch.ones(2, requires_grad=True)}
        source["result"] = source["leaf"] * 2
        staged = api.StateDictStager().stage(source)
        assert not staged["result"].requires_grad
        assert staged["leaf"].requires_grad is not api.is_torch  # as copy.deepcopy has it

    @pytest.mark.parametrize("kind", ["coo", "csr", "bsc"])
    def test_sparse(self, api: Any, kind: str) -> None:
        dense = torch.eye(4)
        dense[1, 2] = 5
        source = {
            "coo": dense.to_sparse,
            "csr": lambda: _quiet(dense.to_sparse_csr),
            "bsc": lambda: _quiet(lambda: dense.to_sparse_bsc((2, 2))),
        }[kind]()
        stager_ = api.StateDictStager()
        if api.is_torch:
            with pytest.raises(Exception, match=r"(?i)storage|data pointer|data_ptr|sparse"):
                stager_.stage({"s": source})
        else:
            staged = stager_.stage({"s": source})["s"]
            assert staged.layout == source.layout
            assert torch.equal(staged.to_dense(), dense)

    def test_meta_tensor_stays_a_meta_tensor(self, api: Any) -> None:
        source = torch.empty(3, 4, device="meta").t()
        stager_ = api.StateDictStager()
        if api.is_torch:
            with pytest.raises(NotImplementedError, match="no data"):
                stager_.stage({"m": source})
        else:
            staged = stager_.stage({"m": source})["m"]
            assert (staged.device.type, staged.shape, staged.stride()) == ("meta", source.shape, source.stride())

    @pytest.mark.parametrize("per_channel", [False, True])
    def test_quantized(self, api: Any, per_channel: bool) -> None:
        values = torch.arange(6.0).view(2, 3)
        scales, zeros = torch.tensor([0.5, 0.25]), torch.tensor([1, 2])
        source = _quiet(
            lambda: (
                torch.quantize_per_channel(values, scales, zeros, 0, torch.qint8)
                if per_channel
                else torch.quantize_per_tensor(values, 0.5, 1, torch.qint8)
            )
        )
        staged = api.StateDictStager().stage({"q": source})["q"]
        if api.is_torch:
            with pytest.raises(RuntimeError, match="UnknownQuantizer"):  # staged without its scale and zero point
                staged.dequantize()
        else:
            assert torch.equal(staged, source)
            assert staged.qscheme() == source.qscheme()

    def test_what_cannot_be_copied_is_named(self, api: Any) -> None:
        source = {"model": {"layers": [1, {"lock": pickle}]}}
        with pytest.raises(TypeError) as caught:
            api.StateDictStager().stage(source)
        assert ("model['layers'][1]['lock']" in str(caught.value)) is not api.is_torch

    def test_reduce_with_six_items(self, api: Any) -> None:
        class SixItems:
            def __init__(self, tensor: torch.Tensor) -> None:
                self.tensor = tensor

            def __reduce_ex__(self, protocol: int) -> Any:
                return (new_object, (type(self),), {"t": self.tensor}, None, None, set_tensor)

        source = SixItems(torch.ones(2))
        if api.is_torch:
            with pytest.raises(RuntimeError, match="length: 6"):
                api.StateDictStager().stage(source)
        else:
            staged = api.StateDictStager().stage(source)
            assert torch.equal(staged.tensor, source.tensor)
            assert staged.tensor.data_ptr() != source.tensor.data_ptr()

    def test_object_with_its_own_deepcopy(self, api: Any) -> None:
        source = collections.OrderedDict(a=SelfCopying(torch.ones(2)))
        staged = api.StateDictStager(share_memory=True).stage(source)
        assert torch.equal(staged["a"].tensor, source["a"].tensor)
        assert staged["a"].tensor.is_shared() is not api.is_torch  # torch: copied where it is, not offloaded


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

    def test_non_blocking_copy_needs_an_accelerator(self, api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
        with pytest.raises(AssertionError, match="accelerator"):
            api.DefaultStager(api.StagingOptions(False, False, False, True))

    def test_without_options(self, api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
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
        for protocol in (torch_staging.AsyncStager, stager.staging.AsyncStager):
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
            with pytest.raises(RuntimeError, match=r"(?i)pin|cuda|accelerator"):
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


class SelfCopying:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __deepcopy__(self, memo: dict[int, Any]) -> SelfCopying:
        import copy

        return SelfCopying(copy.deepcopy(self.tensor, memo))


def new_object(cls: type) -> Any:
    return cls.__new__(cls)


def set_tensor(target: Any, state: dict[str, Any]) -> None:
    target.tensor = state["t"]


def _quiet(make: Any) -> Any:
    """Sparse CSR and quantized tensors warn that they are young or old."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()
