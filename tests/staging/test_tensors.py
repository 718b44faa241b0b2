"""Every kind of tensor comes back exact, or is refused by name."""

from __future__ import annotations

import gc
import io
import warnings
from typing import Any

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from stager.torch_api.staging.state_dict_stager import StateDictStager
from stager.workers.errors import UnstageableError
from tests.staging.compare import assert_private_copy
from tests.staging.conftest import Stage

DTYPES = {
    value
    for name in dir(torch)
    if isinstance(value := getattr(torch, name), torch.dtype) and "q" not in str(value) and "bits" not in str(value)
}


def quietly(make: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sparse, nested and quantized tensors announce their age
        return make()


@pytest.mark.filterwarnings("ignore:ComplexHalf support")
@pytest.mark.parametrize("dtype", sorted(DTYPES, key=str), ids=str)
def test_every_dtype_bit_for_bit(dtype: torch.dtype, stage: Stage) -> None:
    storage = torch.UntypedStorage(64).copy_(torch.arange(64, dtype=torch.uint8).untyped_storage(), False)
    if dtype is torch.bool:
        storage = (torch.arange(64) % 2).to(torch.uint8).untyped_storage()
    source = torch.empty(0, dtype=dtype)
    count = 64 // source.element_size()
    source.set_(storage, 0, (count,), (1,))
    assert_private_copy({"all": source, "part": source[1:]}, stage({"all": source, "part": source[1:]}))


@pytest.mark.parametrize("share_memory", [False, True])
@pytest.mark.parametrize(
    "source",
    [
        torch.zeros(0),
        torch.zeros(3, 0, 2),
        torch.tensor(1.5),
        torch.arange(24).view(2, 3, 4).permute(2, 0, 1),
        torch.arange(24).view(4, 6)[1:, ::2],
        torch.ones(1, 3).expand(4, 3),
        torch.arange(8.0).as_strided((3, 2), (1, 2), 1),
        torch.ones(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        torch.tensor([1 + 2j, 3j]).conj(),
        torch.tensor([1 + 2j, 3j]).conj().imag,
        torch.tensor([[1 + 2j, 3j]]).mH,
        torch.nn.Parameter(torch.ones(2), requires_grad=False),
        torch.nn.Buffer(torch.ones(2)),
    ],
    ids=lambda source: f"{type(source).__name__}{getattr(source, '_spec_size', '')}",
)
def test_layouts(source: torch.Tensor, share_memory: bool, stage: Stage) -> None:
    assert_private_copy({"x": source}, stage({"x": source}, share_memory=share_memory))


def test_storages_in_the_state_alias_their_tensors(stage: Stage) -> None:
    tensor = torch.arange(4)
    staged = stage([tensor.untyped_storage(), tensor, tensor.untyped_storage()])
    assert staged[0] is staged[1].untyped_storage()
    assert staged[2] is staged[0]


def test_parameter_without_a_shape_yet_stays_one(stage: Stage) -> None:
    model = torch.nn.LazyLinear(3)
    staged = stage(model)
    assert type(staged.weight) is torch.nn.UninitializedParameter
    assert staged(torch.ones(2, 5)).shape == (2, 3)
    assert type(model.weight) is torch.nn.UninitializedParameter


def test_gradients_are_not_part_of_the_state(stage: Stage) -> None:
    source = torch.nn.Parameter(torch.ones(2))
    (source * 2).sum().backward()
    assert stage(source).grad is None


def test_subclass_with_data_keeps_class_attributes_and_slots(stage: Stage) -> None:
    class Weight(torch.Tensor):
        __slots__ = "note"  # noqa: PLC0205  # one string is a slot, too

    source = torch.arange(3.0).as_subclass(Weight)
    source.note, source.scale = "n", torch.ones(1)
    staged = stage(source)
    assert type(staged) is Weight
    assert (staged.note, staged.scale.tolist()) == ("n", [1])
    assert staged.scale is not source.scale


def test_wrapper_subclass_through_tensor_flatten(stage: Stage) -> None:
    inner = torch.arange(4.0)
    source = TwoTensor(inner, inner.clone())
    source.label = ["x"]
    staged = stage({"w": source, "inner": inner})
    assert type(staged["w"]) is TwoTensor
    assert staged["w"].a is staged["inner"]
    assert_private_copy(source.b, staged["w"].b)
    assert staged["w"].label == ["x"]
    assert staged["w"].label is not source.label


def test_wrapper_subclass_without_tensor_flatten_is_refused(stage: Stage) -> None:
    class Opaque(torch.Tensor):
        @staticmethod
        def __new__(cls, hidden: torch.Tensor) -> Any:
            return torch.Tensor._make_wrapper_subclass(cls, hidden.shape, dtype=hidden.dtype)

        def __init__(self, hidden: torch.Tensor) -> None:
            self.hidden = hidden

        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            raise NotImplementedError

    with pytest.raises(UnstageableError, match=r"model\['w'\]: .*__tensor_flatten__"):
        stage({"model": {"w": Opaque(torch.ones(2))}})


@pytest.mark.parametrize("layout", ["coo", "uncoalesced", "csr", "csc", "bsr", "bsc"])
def test_sparse(layout: str, stage: Stage) -> None:
    dense = torch.eye(4)
    dense[1, 2] = 5
    source = quietly(
        {
            "coo": dense.to_sparse,
            "uncoalesced": lambda: torch.sparse_coo_tensor([[0, 0], [1, 1]], [1.0, 2.0], (2, 2)),
            "csr": dense.to_sparse_csr,
            "csc": dense.to_sparse_csc,
            "bsr": lambda: dense.to_sparse_bsr((2, 2)),
            "bsc": lambda: dense.to_sparse_bsc((2, 2)),
        }[layout]
    )
    staged = stage({"s": source}, share_memory=True)["s"]
    assert staged.layout == source.layout
    assert torch.equal(staged.to_dense(), source.to_dense())
    if source.layout is torch.sparse_coo:
        assert staged.is_coalesced() is source.is_coalesced()
        assert staged._nnz() == source._nnz()
        source._values().zero_()
    else:
        source.values().zero_()
    assert staged.to_dense().abs().sum() > 0


def test_nested_strided(stage: Stage) -> None:
    source = quietly(lambda: torch.nested.nested_tensor([torch.arange(3.0), torch.arange(5.0)]))
    staged = stage({"n": source})["n"]
    assert [part.tolist() for part in staged.unbind()] == [part.tolist() for part in source.unbind()]


def test_nested_jagged_tensors_that_share_offsets_still_do(stage: Stage) -> None:
    source = torch.nested.nested_tensor([torch.arange(3.0), torch.arange(5.0)], layout=torch.jagged)
    staged = stage([source, source * 2])
    assert [part.tolist() for part in staged[1].unbind()] == [[0, 2, 4], [0, 2, 4, 6, 8]]
    assert staged[0].size() == staged[1].size()  # the ragged size is a symbol of the offsets
    assert staged[0].values().data_ptr() != source.values().data_ptr()


@pytest.mark.parametrize("kind", ["fake", "functional", "vmap", "mkldnn", "freed"])
def test_what_has_no_bytes_of_its_own_is_refused_by_name(kind: str, stage: Stage) -> None:
    refused: list[str] = []

    def attempt(tensor: torch.Tensor) -> torch.Tensor:
        with pytest.raises(UnstageableError) as caught:
            stage({"a": [tensor]})
        refused.append(caught.value.key_path)
        return tensor

    if kind == "fake":
        with torch._subclasses.FakeTensorMode():
            attempt(torch.empty(3))
    elif kind == "functional":
        torch.func.functionalize(attempt)(torch.ones(3))
    elif kind == "vmap":
        torch.func.vmap(attempt)(torch.ones(3, 2))
    elif kind == "mkldnn":
        if not torch.backends.mkldnn.is_available():
            pytest.skip("torch was built without mkldnn")
        attempt(torch.ones(3).to_mkldnn())
    else:
        freed = torch.ones(4)
        freed.untyped_storage().resize_(0)
        attempt(freed)
    assert refused == ["a[0]"]


@pytest.mark.parametrize("share_memory", [False, True])
def test_under_callers_modes(share_memory: bool, stage: Stage) -> None:
    source = torch.nn.Parameter(torch.ones(3))
    with torch.device("meta"):
        assert stage(source, share_memory=share_memory).device.type == "cpu"
    with torch.inference_mode():
        staged = stage([source, torch.ones(2)], share_memory=share_memory)
    assert staged[0].requires_grad
    assert not any(tensor.is_inference() for tensor in staged)


def test_staged_tensors_go_through_torch_save(stage: Stage) -> None:
    source = {"a": torch.arange(5), "b": torch.randn(2, 2).t()}
    staged = stage(source, share_memory=True)
    file = io.BytesIO()
    torch.save(staged, file)
    assert len(file.getvalue()) < 10_000  # a slice's own bytes, not those of the mapping it lies in
    file.seek(0)
    assert_private_copy(source, torch.load(file))


def test_staged_memory_is_freed_with_its_last_tensor() -> None:
    stager = StateDictStager(share_memory=True)
    staged = stager.stage([torch.ones(4), torch.ones(1 << 19)])
    before = shared_mappings()
    stager.close()
    del stager, staged
    gc.collect()
    assert shared_mappings() == before - 2


def shared_mappings() -> int:
    with open("/proc/self/maps") as maps:
        return sum("memfd:stager" in line for line in maps)
