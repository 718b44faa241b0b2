"""``StateDictStager``: one set of expectations, run against torch's classes and against stager's.

Where torch falls short a test says so in the branch ``if api.is_torch``: those branches fail on the day torch is mended.
"""

from __future__ import annotations

import collections
import gc
import inspect
import pickle
import weakref
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint._state_dict_stager as torch_stager

from tests.staging.aliases import views
from tests.staging.compare import assert_private_copy


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
            theirs = inspect.signature(getattr(torch_stager.StateDictStager, name)).parameters
            ours = inspect.signature(getattr(api.StateDictStager, name)).parameters
            assert list(ours)[: len(theirs)] == list(theirs), name
            assert all(ours[key].default in (theirs[key].default, None) for key in theirs), name

    def test_views_of_one_storage_stay_views_of_one_storage(self, copying_api: Any) -> None:
        source = views()
        staged = copying_api.StateDictStager().stage(source)
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

    def test_dataclasses_are_copied_with_their_tensors(self, copying_api: Any) -> None:
        source = {"outer": Outer("n", Inner(torch.randn(3)), [1.0]), "frozen": Frozen(torch.randn(2))}
        assert_private_copy(source, copying_api.StateDictStager().stage(source))

    def test_tensor_attributes_survive(self, copying_api: Any) -> None:
        source = torch.randn(3)
        source.tag, source.partner = "x", torch.arange(2)
        staged = copying_api.StateDictStager().stage({"w": source})["w"]
        assert staged.tag == "x"
        assert torch.equal(staged.partner, source.partner)
        assert staged.partner.data_ptr() != source.partner.data_ptr()

    @pytest.mark.parametrize(
        "dtype",
        [torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.complex64, torch.bool, torch.int8, torch.uint16],
    )
    def test_dtypes_are_exact(self, copying_api: Any, dtype: torch.dtype) -> None:
        source = {"w": (torch.arange(8) % 2).to(dtype)}
        assert_private_copy(source, copying_api.StateDictStager().stage(source))

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

    def test_conjugate_and_negative_views_keep_their_values(self, copying_api: Any) -> None:
        source = {"conj": torch.tensor([1 + 2j]).conj(), "neg": torch.tensor([1 + 2j]).conj().imag}
        staged = copying_api.StateDictStager().stage(source)
        if copying_api.is_torch:
            assert staged["conj"].tolist() == [1 + 2j]  # wrong, and silently so
            assert staged["neg"].tolist() == [2.0]
        else:
            assert_private_copy(source, staged)
            assert staged["conj"].tolist() == [1 - 2j]
            assert staged["neg"].tolist() == [-2.0]

    def test_parameter_stays_a_parameter(self, copying_api: Any) -> None:
        staged = copying_api.StateDictStager().stage({"p": torch.nn.Parameter(torch.ones(2))})["p"]
        if copying_api.is_torch:
            assert type(staged) is torch.Tensor  # and so a staged module's parameters are none
        else:
            assert type(staged) is torch.nn.Parameter
            assert staged.requires_grad

    def test_tensor_that_requires_grad(self, copying_api: Any) -> None:
        source = {"leaf": torch.ones(2, requires_grad=True)}
        source["result"] = source["leaf"] * 2
        staged = copying_api.StateDictStager().stage(source)
        assert not staged["result"].requires_grad
        assert staged["leaf"].requires_grad is not copying_api.is_torch  # as copy.deepcopy has it

    @pytest.mark.parametrize("kind", ["coo", "csr", "bsc"])
    def test_sparse(self, copying_api: Any, kind: str) -> None:
        dense = torch.eye(4)
        dense[1, 2] = 5
        source = {
            "coo": dense.to_sparse,
            "csr": lambda: _quiet(dense.to_sparse_csr),
            "bsc": lambda: _quiet(lambda: dense.to_sparse_bsc((2, 2))),
        }[kind]()
        stager_ = copying_api.StateDictStager()
        if copying_api.is_torch:
            with pytest.raises(Exception, match=r"(?i)storage|data pointer|data_ptr|sparse"):
                stager_.stage({"s": source})
        else:
            staged = stager_.stage({"s": source})["s"]
            assert staged.layout == source.layout
            assert torch.equal(staged.to_dense(), dense)

    def test_meta_tensor_stays_a_meta_tensor(self, copying_api: Any) -> None:
        source = torch.empty(3, 4, device="meta").t()
        stager_ = copying_api.StateDictStager()
        if copying_api.is_torch:
            with pytest.raises(NotImplementedError, match="no data"):
                stager_.stage({"m": source})
        else:
            staged = stager_.stage({"m": source})["m"]
            assert (staged.device.type, staged.shape, staged.stride()) == ("meta", source.shape, source.stride())

    @pytest.mark.parametrize("per_channel", [False, True])
    def test_quantized(self, copying_api: Any, per_channel: bool) -> None:
        values = torch.arange(6.0).view(2, 3)
        scales, zeros = torch.tensor([0.5, 0.25]), torch.tensor([1, 2])
        source = _quiet(
            lambda: (
                torch.quantize_per_channel(values, scales, zeros, 0, torch.qint8)
                if per_channel
                else torch.quantize_per_tensor(values, 0.5, 1, torch.qint8)
            )
        )
        staged = copying_api.StateDictStager().stage({"q": source})["q"]
        if copying_api.is_torch:
            with pytest.raises(RuntimeError, match="UnknownQuantizer"):  # staged without its scale and zero point
                staged.dequantize()
        else:
            assert torch.equal(staged, source)
            assert staged.qscheme() == source.qscheme()

    def test_what_cannot_be_copied_is_named(self, copying_api: Any) -> None:
        source = {"model": {"layers": [1, {"lock": pickle}]}}
        with pytest.raises(TypeError) as caught:
            copying_api.StateDictStager().stage(source)
        assert ("model['layers'][1]['lock']" in str(caught.value)) is not copying_api.is_torch

    def test_reduce_with_six_items(self, copying_api: Any) -> None:
        class SixItems:
            def __init__(self, tensor: torch.Tensor) -> None:
                self.tensor = tensor

            def __reduce_ex__(self, protocol: int) -> Any:
                return (new_object, (type(self),), {"t": self.tensor}, None, None, set_tensor)

        source = SixItems(torch.ones(2))
        if copying_api.is_torch:
            with pytest.raises(RuntimeError, match="length: 6"):
                copying_api.StateDictStager().stage(source)
        else:
            staged = copying_api.StateDictStager().stage(source)
            assert torch.equal(staged.tensor, source.tensor)
            assert staged.tensor.data_ptr() != source.tensor.data_ptr()

    def test_object_with_its_own_deepcopy(self, copying_api: Any) -> None:
        source = collections.OrderedDict(a=SelfCopying(torch.ones(2)))
        staged = copying_api.StateDictStager(share_memory=True).stage(source)
        assert torch.equal(staged["a"].tensor, source["a"].tensor)
        assert staged["a"].tensor.is_shared() is not copying_api.is_torch  # torch: copied where it is, not offloaded


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
