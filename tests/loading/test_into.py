"""Restoring in place: the very tensors that are there get the bytes, and nothing is changed when something does not fit."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import nn

from stager import CorruptCheckpointError, StateMismatchError, UnsafePickleError
from stager.workers.checkpoint.formats import FORMATS
from tests.loading.restoring import contents, refused, restore
from tests.persistence.tasks import restorer, save
from tests.states import bits, same


def test_tensors_keep_identity_memory_and_gradients(run_dir: Path) -> None:
    weight = nn.Parameter(torch.zeros(3, 4))
    weight.grad = torch.ones(3, 4)
    state = {"w": torch.randn(3, 4), "s": torch.tensor(5), "e": torch.empty(0, 2), "b": torch.tensor([True, False])}
    into = {"w": weight, "s": torch.tensor(0), "e": torch.empty(0, 2), "b": torch.tensor([False, False])}
    before = {name: (id(t), t.data_ptr()) for name, t in into.items()}
    restore(run_dir, state, into)
    assert {name: (id(t), t.data_ptr()) for name, t in into.items()} == before
    assert all(bits(into[name]) == bits(state[name]) for name in state)
    assert weight.requires_grad and weight.is_leaf and torch.equal(weight.grad, torch.ones(3, 4))


def test_autograd_notices_that_a_tensor_was_overwritten(run_dir: Path) -> None:
    weight = nn.Parameter(torch.ones(3))
    loss = (weight**2).sum()
    restore(run_dir, {"w": torch.zeros(3)}, {"w": weight})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    "target",
    [
        torch.zeros(5, 3).t(),
        torch.zeros(6, 10)[::2, ::2],
        torch.zeros(3, 5, 2)[..., 1],
        torch.zeros(20)[5:].view(3, 5),
        torch.zeros(3, 5, dtype=torch.complex64).imag,
        torch.zeros(1, 3, 5)[0],
    ],
    ids=["transposed", "strided", "last column", "slice", "imaginary", "row"],
)
def test_views_of_any_stride_get_the_values_and_their_surroundings_stay(run_dir: Path, target: torch.Tensor) -> None:
    state = {"x": torch.randn(3, 5), "y": torch.randn(3, 5).t()}
    restore(run_dir, state, {"x": target, "y": torch.zeros(5, 3)})
    assert bits(target) == bits(state["x"])
    base = target if target._base is None else target._base
    assert int(torch.view_as_real(base).count_nonzero() if base.is_complex() else base.count_nonzero()) == 15


def test_conjugate_and_negative_views(run_dir: Path) -> None:
    values = torch.randn(4, dtype=torch.complex64)
    base = torch.zeros(4, dtype=torch.complex64)
    restore(run_dir, {"x": values}, {"x": base.conj()})
    assert torch.equal(base, values.conj().resolve_conj())


def test_inference_tensors_and_inference_mode(run_dir: Path) -> None:
    with torch.inference_mode():
        target = torch.zeros(3)
        restore(run_dir, {"x": torch.arange(3.0)}, {"x": target})
    assert torch.equal(target, torch.arange(3.0))


def test_nested_containers_keep_their_identity(run_dir: Path) -> None:
    state = {"a": {"t": torch.arange(3), "n": 5, 7: "seven"}, "l": [torch.ones(2), {"k": None}], "p": (1, 2)}
    into = {"a": {"t": torch.zeros(3, dtype=torch.int64), "n": 0, 7: ""}, "l": [torch.zeros(2), {"k": 1}], "p": None}
    containers = into["a"], into["l"], into["l"][1]
    restore(run_dir, state, into)
    assert same(into, state)
    assert (into["a"], into["l"], into["l"][1]) == containers and into["a"] is containers[0]


def test_only_what_is_named_is_read(run_dir: Path) -> None:
    """Part of a checkpoint: other names are neither restored nor unpickled."""
    info = save(run_dir, {"x": torch.ones(2), "unsafe": Unsafe(), "y": torch.ones(3)})
    into = {"x": torch.zeros(2)}
    restorer(info).load_into(into, True)
    assert same(into, {"x": torch.ones(2)})
    with pytest.raises(UnsafePickleError):
        restorer(info).load_into({"x": torch.zeros(2), "unsafe": None}, True)


class Unsafe:
    pass


_T = torch.arange(6.0)
MISMATCHES: dict[str, tuple[Any, Any, str]] = {
    "shape": (_T, torch.zeros(5), r"x: has shape \[5\] in the target and \[6\] in the checkpoint"),
    "0-dim": (torch.tensor(1.0), torch.zeros(1), r"x: has shape \[1\] in the target and \[\] in the checkpoint"),
    "dtype": (_T, torch.zeros(6, dtype=torch.float64), "x: is float64 in the target and float32 in the checkpoint"),
    "sparse here": (_T, torch.zeros(6).to_sparse(), "x: is torch.sparse_coo in the target and dense in the checkpoint"),
    "dense here": (
        _T.to_sparse(),
        torch.zeros(6),
        "x: is torch.strided in the target and torch.sparse_coo in the checkpoint",
    ),
    "sparse shape": (_T.to_sparse(), torch.zeros(7).to_sparse(), r"x: has shape \[7\] in the target and \[6\]"),
    "sparse dtype": (_T.to_sparse(), torch.zeros(6).int().to_sparse(), "x: is int32 in the target and float32"),
    "object there": (3, torch.zeros(6), "x: is a tensor in the target and a int in the checkpoint"),
    "container there": ({"k": _T}, torch.zeros(6), "x: is a tensor in the target and a mapping in the checkpoint"),
    "list there": ([_T], torch.zeros(6), "x: is a tensor in the target and a list in the checkpoint"),
    "mapping here": (_T, {"k": torch.zeros(6)}, "x: is a dict in the target and a single value in the checkpoint"),
    "list here": (_T, [torch.zeros(6)], "x: is a list in the target and a single value in the checkpoint"),
    "list for mapping": ([_T], {"k": torch.zeros(6)}, "x: is a dict in the target and a list in the checkpoint"),
    "expanded": (_T, torch.zeros(1).expand(6), "x: is expanded"),
    "meta": (_T, torch.zeros(6, device="meta"), "x: is on the meta device"),
    "frozen": ({"n": 1}, MappingProxyType({"n": 0}), r"x\['n'\]: .* is in a mappingproxy, which cannot be changed"),
    "deep": ({"a": [{"b": _T}]}, {"a": [{"b": torch.zeros(2)}]}, r"x\['a'\]\[0\]\['b'\]: has shape"),
}


_NEVER_REPLACED = ("expanded", "meta", "frozen")


@pytest.mark.parametrize(
    "name, strict", [*((name, True) for name in MISMATCHES), *((name, False) for name in _NEVER_REPLACED)]
)
def test_mismatch_is_named_and_nothing_is_changed(run_dir: Path, name: str, strict: bool) -> None:
    there, here, message = MISMATCHES[name]
    into = {"before": torch.zeros(3), "x": here, "after": torch.zeros(3), "n": 0}
    refused(run_dir, {"before": torch.ones(3), "x": there, "after": torch.ones(3), "n": 1}, into, message, strict)


@pytest.mark.parametrize("name", [name for name in MISMATCHES if name not in _NEVER_REPLACED])
def test_not_strict_puts_what_does_not_fit_in_the_place_of_a_tensor_that_nobody_owns(run_dir: Path, name: str) -> None:
    there, here, _ = MISMATCHES[name]
    into = {"x": here, "n": 0}
    one = restorer(save(run_dir, {"x": there, "n": 1}))
    one.load_into(into, strict=False)
    assert str(into["x"]) == str(there) and into["n"] == 1
    assert one.outcome.replaced and all(name.split(".")[0] == "x" for name in one.outcome.replaced)


def test_frozen_containers_of_tensors_are_restored_in_place(run_dir: Path) -> None:
    target = torch.zeros(2)
    restore(run_dir, {"x": {"t": torch.ones(2)}}, {"x": MappingProxyType({"t": target})})
    assert torch.equal(target, torch.ones(2))


def test_every_missing_and_unexpected_key_is_listed(run_dir: Path) -> None:
    model, other = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)), nn.Sequential(nn.Linear(1, 1), nn.Identity())
    other.register_parameter("own", nn.Parameter(torch.zeros(1)))
    info = save(run_dir, {"m": model, "s": model.state_dict(), "other": 5})
    into = {"m": other, "s": other.state_dict(), "y": 1}
    before = contents(into)
    with pytest.raises(StateMismatchError, match="nothing was changed") as raised:
        restorer(info).load_into(into, True)
    lines = str(raised.value).splitlines()[1:]
    assert sorted(lines[:-1]) == sorted(
        [f"  {name}['own']: is in the target but not in the checkpoint" for name in "ms"]
        + [
            f"  {name}['1.{key}']: is in the checkpoint but not in the target"
            for name in "ms"
            for key in ("weight", "bias")
        ]
        + ["  y: is in the target but not in the checkpoint, which also has other"]
    )
    assert contents(into) == before and "strict=False" in lines[-1]


def test_not_strict_loads_what_fits(run_dir: Path) -> None:
    state = {"x": {"a": torch.ones(1), "b": 1, "d": {"e": torch.ones(2)}}, "l": [1, torch.ones(1), "three"]}
    into = {"x": {"a": torch.zeros(1), "c": 2}, "l": [0, torch.zeros(1)], "y": 1}
    a, b = into["x"]["a"], into["l"]
    one = restorer(save(run_dir, state))
    one.load_into(into, strict=False)
    assert same(into, state | {"y": 1})
    assert into["x"]["a"] is a and into["l"] is b
    assert one.outcome.missing == ("y",) and one.outcome.unexpected == ()


def test_long_lists_of_problems_are_cut(run_dir: Path) -> None:
    state = {f"t{i}": torch.zeros(2) for i in range(30)}
    refused(run_dir, state, {name: torch.zeros(3) for name in state}, r"\.\.\. and 10 more")


# -- damage ---------------------------------------------------------------------------------------------------------


def test_pickle_that_is_not_allowed_is_refused_before_a_tensor_is_touched(run_dir: Path) -> None:
    into = {"x": torch.zeros(3), "u": None}
    before = contents(into)
    with pytest.raises(UnsafePickleError, match=r"^u in .* could run code when loaded.*allow_pickle=True"):
        restore(run_dir, {"x": torch.ones(3), "u": Unsafe()}, into)
    assert contents(into) == before
    restorer(save(run_dir, {"x": torch.ones(3), "u": Unsafe()}), allow_pickle=True).load_into(into, True)
    assert isinstance(into["u"], Unsafe)


def test_damaged_object_is_refused_before_a_tensor_is_touched(run_dir: Path) -> None:
    info = save(run_dir, {"x": torch.ones(3), "n": 5})
    path = Path(info.path, "__0_objects.distcp")
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    into = {"x": torch.zeros(3), "n": None}
    before = contents(into)
    with pytest.raises(CorruptCheckpointError, match=r"damaged \(n\)"):
        restorer(info).load_into(into, True)
    assert contents(into) == before


@pytest.mark.parametrize("num_threads", [1, 4])
def test_damaged_tensor_is_named(run_dir: Path, num_threads: int) -> None:
    info = save(run_dir, {"a": torch.ones(3_000_000), "b": {"c": torch.zeros(3_000_000)}}, num_parts=1)
    path = Path(info.path, "__0_0.distcp")
    with open(path, "r+b") as file:
        file.seek(info.nbytes - 9000)
        file.write(b"\1")
    with pytest.raises(CorruptCheckpointError, match=r"damaged \(b\['c'\]\)"):
        restorer(info, num_threads=num_threads).load_into({"b": {"c": torch.zeros(3_000_000)}}, True)
    into = {"a": torch.zeros(3_000_000)}
    restorer(info, num_threads=num_threads).load_into(into, True)
    assert torch.equal(into["a"], torch.ones(3_000_000))


@pytest.mark.parametrize("kind", sorted(FORMATS))
def test_tensor_without_bytes_is_read_alone(run_dir: Path, kind: str) -> None:
    """In the format safetensors nothing of the file is its own."""
    info = save(run_dir, {"a": torch.ones(3), "e": torch.empty(0, 2)}, kind=kind, num_parts=1)
    target = {"e": torch.empty(0, 2)}
    restorer(info).load_into(target, strict=True)
    assert target["e"].shape == (0, 2)
