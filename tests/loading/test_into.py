"""Restoring in place: the very tensors that are there get the bytes, and nothing is changed when something does not fit."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import nn

from stager import CorruptCheckpointError, StateMismatchError, UnsafePickleError
from tests.persistence.jobs import restorer, save
from tests.states import bits, same
from workers.formats import FORMATS


def restore(run_dir: Path, state: dict[str, Any], into: dict[str, Any], strict: bool = True, **options: Any) -> None:
    restorer(save(run_dir, state, **options)).load_into(into, strict)


def refused(run_dir: Path, state: dict[str, Any], into: dict[str, Any], message: str, strict: bool = True) -> None:
    """It is refused with this message, and nothing of ``into`` is changed."""
    before = _contents(into)
    with pytest.raises(StateMismatchError, match=message) as raised:
        restore(run_dir, state, into, strict)
    assert "nothing was changed" in str(raised.value)
    assert _contents(into) == before


def _contents(value: Any) -> Any:
    """Values, identities and versions of everything in it."""
    if isinstance(value, torch.Tensor):
        plain = value.layout is torch.strided and not value.is_meta
        return id(value), value._version, bits(value) if plain else None
    if isinstance(value, nn.Module):
        return id(value), _contents(value.state_dict(keep_vars=True))
    if isinstance(value, torch.optim.Optimizer):
        return id(value), _contents(list(value.state.values())), repr(value)
    if hasattr(value, "items"):
        return {k: _contents(v) for k, v in value.items()}
    return [_contents(v) for v in value] if isinstance(value, (list, tuple)) else (id(value), repr(value))


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
    "shape": (_T, torch.zeros(5), r"x: has shape \[5\] here and \[6\] in the checkpoint"),
    "0-dim": (torch.tensor(1.0), torch.zeros(1), r"x: has shape \[1\] here and \[\] in the checkpoint"),
    "dtype": (_T, torch.zeros(6, dtype=torch.float64), "x: is float64 here and float32 in the checkpoint"),
    "sparse here": (_T, torch.zeros(6).to_sparse(), "x: is torch.sparse_coo here and dense in the checkpoint"),
    "dense here": (_T.to_sparse(), torch.zeros(6), "x: is torch.strided here and torch.sparse_coo in the checkpoint"),
    "sparse shape": (_T.to_sparse(), torch.zeros(7).to_sparse(), r"x: has shape \[7\] here and \[6\]"),
    "sparse dtype": (_T.to_sparse(), torch.zeros(6).int().to_sparse(), "x: is int32 here and float32"),
    "object there": (3, torch.zeros(6), "x: is a tensor here and a int in the checkpoint"),
    "container there": ({"k": _T}, torch.zeros(6), "x: is a tensor here and a mapping in the checkpoint"),
    "list there": ([_T], torch.zeros(6), "x: is a tensor here and a list in the checkpoint"),
    "mapping here": (_T, {"k": torch.zeros(6)}, "x: is a dict here and a single value in the checkpoint"),
    "list here": (_T, [torch.zeros(6)], "x: is a list here and a single value in the checkpoint"),
    "list for mapping": ([_T], {"k": torch.zeros(6)}, "x: is a dict here and a list in the checkpoint"),
    "expanded": (_T, torch.zeros(1).expand(6), "x: is expanded"),
    "meta": (_T, torch.zeros(6, device="meta"), "x: is on the meta device"),
    "frozen": ({"n": 1}, MappingProxyType({"n": 0}), r"x\['n'\]: its container mappingproxy cannot be changed"),
    "deep": ({"a": [{"b": _T}]}, {"a": [{"b": torch.zeros(2)}]}, r"x\['a'\]\[0\]\['b'\]: has shape"),
}


@pytest.mark.parametrize("name", MISMATCHES)
@pytest.mark.parametrize("strict", [True, False])
def test_mismatch_is_named_and_nothing_is_changed(run_dir: Path, name: str, strict: bool) -> None:
    there, here, message = MISMATCHES[name]
    into = {"before": torch.zeros(3), "x": here, "after": torch.zeros(3), "n": 0}
    refused(run_dir, {"before": torch.ones(3), "x": there, "after": torch.ones(3), "n": 1}, into, message, strict)


def test_frozen_containers_of_tensors_are_restored_in_place(run_dir: Path) -> None:
    target = torch.zeros(2)
    restore(run_dir, {"x": {"t": torch.ones(2)}}, {"x": MappingProxyType({"t": target})})
    assert torch.equal(target, torch.ones(2))


def test_every_missing_and_unexpected_key_is_listed(run_dir: Path) -> None:
    state = {"x": {"a": torch.ones(1), "b": 1}, "l": [1, torch.ones(1)], "other": 5}
    into = {"x": {"a": torch.zeros(1), "c": 2}, "l": [0, torch.zeros(1), 3], "y": 1}
    message = (
        r"y: missing in the checkpoint\n|x\['c'\]: missing in the checkpoint\n|l\[2\]: missing in the checkpoint\n"
        r"|x\['b'\]: in the checkpoint, but not here\n|strict=False"
    )
    refused(run_dir, state, into, message)
    try:
        restore(run_dir, state, into)
    except StateMismatchError as error:
        lines = str(error).splitlines()[1:]
    assert sorted(lines[:-1]) == [
        "  l[2]: missing in the checkpoint",
        "  x['b']: in the checkpoint, but not here",
        "  x['c']: missing in the checkpoint",
        "  y: missing in the checkpoint",
    ]


def test_not_strict_loads_what_fits(run_dir: Path) -> None:
    state = {"x": {"a": torch.ones(1), "b": 1, "d": {"e": torch.ones(2)}}, "l": [1, torch.ones(1), "three"]}
    into = {"x": {"a": torch.zeros(1), "c": 2}, "l": [0, torch.zeros(1)], "y": 1}
    a, b = into["x"]["a"], into["l"]
    restore(run_dir, state, into, strict=False)
    assert same(into, {"x": {"a": torch.ones(1), "c": 2, "b": 1, "d": {"e": torch.ones(2)}}, "l": state["l"], "y": 1})
    assert into["x"]["a"] is a and into["l"] is b


def test_long_lists_of_problems_are_cut(run_dir: Path) -> None:
    state = {f"t{i}": torch.zeros(2) for i in range(30)}
    refused(run_dir, state, {name: torch.zeros(3) for name in state}, r"\.\.\. and 10 more")


# -- tied weights, shared memory ---------------------------------------------------------------------------------


def test_tied_there_and_not_here(run_dir: Path) -> None:
    weight = torch.randn(4, 4)
    into = {"a": torch.zeros(4, 4), "b": torch.zeros(4, 4), "c": torch.zeros(4, 4).t(), "d": None}
    a, b = into["a"], into["b"]
    restore(run_dir, {"a": weight, "b": weight, "c": weight, "d": weight}, into)
    assert into["a"] is a and into["b"] is b and a.data_ptr() != b.data_ptr()
    assert all(bits(into[name]) == bits(weight) for name in "abcd")


def test_tied_here_and_not_there_the_last_one_wins(run_dir: Path) -> None:
    """As when load_state_dict() is given different values for one tensor; never a mixture of the two."""
    state = {f"t{i}": torch.full((300_000,), float(i)) for i in range(8)}
    shared = torch.zeros(300_000)
    restore(run_dir, state, dict.fromkeys(state, shared))
    assert torch.equal(shared, state["t7"])
    reverse = dict.fromkeys(reversed(state), shared)
    restore(run_dir, state, reverse)
    assert torch.equal(shared, state["t0"])


def test_overlapping_views_of_one_base(run_dir: Path) -> None:
    source, target = torch.randn(10, 10), torch.zeros(10, 10)

    def views(base: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"a": base[1:5], "b": base[3:8], "t": base.t(), "c": base[:, 2], "row": base[9]}

    restore(run_dir, views(source), views(target))
    assert torch.equal(source, target)


def test_value_that_is_tied_there_is_not_taken_from_memory_that_something_else_overwrote(run_dir: Path) -> None:
    first, second = torch.full((50,), 1.0), torch.full((50,), 2.0)
    shared = torch.zeros(50)
    into = {"a": shared, "copy": None, "b": shared}
    restore(run_dir, {"a": first, "copy": first, "b": second}, into)
    assert torch.equal(into["copy"], first) and torch.equal(shared, second)


def test_tied_module_weights(run_dir: Path) -> None:
    def model(tied: bool) -> nn.Module:
        result = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
        if tied:
            result[1].weight = result[0].weight
        return result

    for there, here in [(True, True), (True, False), (False, True)]:
        source, target = model(there), model(here)
        parameters = [id(p) for p in target.parameters()]
        restore(run_dir, {"m": source}, {"m": target})
        assert [id(p) for p in target.parameters()] == parameters
        assert torch.equal(target[1].weight, source[1].weight)
        assert here or torch.equal(target[0].weight, source[0].weight)


# -- modules and optimizers ---------------------------------------------------------------------------------------


def trained(seed: int, steps: int = 2, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), **options)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 4)).sum().backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("steps", [0, 3], ids=["fresh", "used"])
def test_module_and_optimizer(run_dir: Path, steps: int) -> None:
    model, optimizer = trained(1)
    target, target_optimizer = trained(2, steps, lr=0.5)
    tensors = [*target.parameters(), *target.buffers()]
    moments = [state["exp_avg"] for state in target_optimizer.state.values()]
    restore(run_dir, {"m": model, "o": optimizer}, {"m": target, "o": target_optimizer})
    assert same(dict(target.state_dict()), dict(model.state_dict()))
    assert same(target_optimizer.state_dict(), optimizer.state_dict())
    assert all(a is b for a, b in zip(tensors, [*target.parameters(), *target.buffers()], strict=True))
    if steps:
        assert all(a is b["exp_avg"] for a, b in zip(moments, target_optimizer.state.values(), strict=True))
    data = torch.randn(5, 4)
    for each, its_optimizer in ((model, optimizer), (target, target_optimizer)):  # and goes on the same
        its_optimizer.zero_grad()
        each(data).sum().backward()
        its_optimizer.step()
    assert same(dict(target.state_dict()), dict(model.state_dict()))


def modules_that_do_not_fit() -> Iterator[Any]:
    model, _ = trained(1)
    yield pytest.param(
        nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)), r"m\['2.weight'\]: has shape", id="shape"
    )
    yield pytest.param(
        nn.Sequential(*model, nn.Linear(2, 2)), r"m\['3.bias'\]: missing in the checkpoint", id="missing"
    )
    yield pytest.param(copy.deepcopy(model[:2]), r"m\['2.bias'\]: in the checkpoint, but not here", id="unexpected")
    yield pytest.param(copy.deepcopy(model).to("meta"), r"m\['0.weight'\]: is on the meta device", id="meta")


@pytest.mark.parametrize("target, message", [*modules_that_do_not_fit()])
def test_module_that_does_not_fit(run_dir: Path, target: nn.Module, message: str) -> None:
    refused(run_dir, {"a": torch.ones(1), "m": trained(1)[0]}, {"a": torch.zeros(1), "m": target}, message)


def test_module_for_something_else(run_dir: Path) -> None:
    refused(run_dir, {"m": 5}, {"m": nn.Linear(1, 1)}, "m: is a Linear here and a single value in the checkpoint")
    refused(run_dir, {"m": [torch.ones(1)]}, {"m": nn.Linear(1, 1)}, "m: is a Linear here and a list in the checkpoint")


def test_not_strict_module(run_dir: Path) -> None:
    source, target = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    restore(run_dir, {"m": source}, {"m": target}, strict=False)
    assert same(dict(target[0].state_dict()), dict(source[0].state_dict()))
    refused(run_dir, {"m": nn.Linear(2, 2)}, {"m": nn.Linear(2, 3)}, "has shape", strict=False)


def test_module_of_another_dtype_is_converted_as_torch_does(run_dir: Path) -> None:
    source, target = nn.Linear(3, 3), nn.Linear(3, 3).to(torch.bfloat16)
    restore(run_dir, {"m": source}, {"m": target})
    assert torch.equal(target.weight, source.weight.to(torch.bfloat16))


class WithExtraState(nn.Module):
    def __init__(self, extra: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.extra = extra

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


@pytest.mark.parametrize(
    "extra", [None, {}, 3, {"a": {"b": torch.arange(3)}, "c": 1}, [torch.ones(1)], "text"], ids=str
)
def test_module_with_extra_state(run_dir: Path, extra: Any) -> None:
    target = WithExtraState({"a": {"b": torch.zeros(3, dtype=torch.int64)}, "c": 0})
    restore(run_dir, {"m": WithExtraState(extra)}, {"m": target})
    assert same(target.extra, extra)


def test_lazy_module(run_dir: Path) -> None:
    source, target = nn.Linear(3, 2), nn.LazyLinear(2)
    restore(run_dir, {"m": source}, {"m": target})
    assert torch.equal(target.weight, source.weight)


def optimizers_that_do_not_fit() -> Iterator[Any]:
    model, _ = trained(1)
    halves = [{"params": list(model[0].parameters())}, {"params": [*model[1].parameters(), *model[2].parameters()]}]
    yield pytest.param(torch.optim.AdamW(halves), "o: has 2 parameter groups, the checkpoint 1", id="groups")
    few = torch.optim.AdamW(model[0].parameters())
    yield pytest.param(few, r"o\['param_groups'\]\[0\]: has 2 parameters, the checkpoint 6", id="parameters")


@pytest.mark.parametrize("target, message", [*optimizers_that_do_not_fit()])
def test_optimizer_that_does_not_fit(run_dir: Path, target: torch.optim.Optimizer, message: str) -> None:
    model, optimizer = trained(1)
    into = {"m": copy.deepcopy(model), "x": torch.zeros(1), "o": target}
    refused(run_dir, {"m": model, "o": optimizer, "x": torch.ones(1)}, into, message)


def test_optimizer_for_something_else(run_dir: Path) -> None:
    _, optimizer = trained(1)
    others: list[Any] = [5, {"state": {}}, {"state": {}, "param_groups": 3}, {"param_groups": [torch.ones(1)]}]
    for other in others:
        refused(run_dir, {"o": other}, {"o": optimizer}, "o: is a AdamW here, and none in the checkpoint")


class Clearing:
    """Takes its state by clearing first, as some objects do: it must not be handed its own tensors."""

    def __init__(self, value: float) -> None:
        self.buffer = torch.full((4,), value)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"buffer": self.buffer}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.buffer.zero_()
        self.buffer += state["buffer"]


def test_object_that_clears_itself_before_it_takes_its_state(run_dir: Path) -> None:
    target = Clearing(2.0)
    buffer = target.buffer
    restore(run_dir, {"c": Clearing(7.0)}, {"c": target})
    assert target.buffer is buffer and torch.equal(buffer, torch.full((4,), 7.0))


class ModuleOfItsOwn(nn.Linear):
    """Renames a key and takes no ``strict``."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(OrderedDict(weight=state["w"], bias=state["bias"]))


@pytest.mark.parametrize("strict", [True, False])
def test_module_that_loads_in_its_own_way_is_left_to_it(run_dir: Path, strict: bool) -> None:
    target = ModuleOfItsOwn(2, 2)
    restore(run_dir, {"m": {"w": torch.ones(2, 2), "bias": torch.zeros(2)}}, {"m": target}, strict=strict)
    assert torch.equal(target.weight, torch.ones(2, 2))


def test_module_metadata_reaches_the_module(run_dir: Path) -> None:
    """The versions that nn.Module hangs on its state: without them BatchNorm would invent num_batches_tracked."""
    seen: list[Any] = []
    target = nn.BatchNorm1d(2)
    target._register_load_state_dict_pre_hook(lambda state, prefix, metadata, *_: seen.append(metadata))
    restore(run_dir, {"m": nn.BatchNorm1d(2)}, {"m": target})
    assert seen[0]["version"] == 2


# -- damage ---------------------------------------------------------------------------------------------------------


def test_pickle_that_is_not_allowed_is_refused_before_a_tensor_is_touched(run_dir: Path) -> None:
    into = {"x": torch.zeros(3), "u": None}
    before = _contents(into)
    with pytest.raises(UnsafePickleError, match=r"^u in .* could run code when loaded.*allow_pickle=True"):
        restore(run_dir, {"x": torch.ones(3), "u": Unsafe()}, into)
    assert _contents(into) == before
    restorer(save(run_dir, {"x": torch.ones(3), "u": Unsafe()}), allow_pickle=True).load_into(into, True)
    assert isinstance(into["u"], Unsafe)


def test_damaged_object_is_refused_before_a_tensor_is_touched(run_dir: Path) -> None:
    info = save(run_dir, {"x": torch.ones(3), "n": 5})
    path = Path(info.path, "__0_objects.distcp")
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    into = {"x": torch.zeros(3), "n": None}
    before = _contents(into)
    with pytest.raises(CorruptCheckpointError, match=r"damaged \(n\)"):
        restorer(info).load_into(into, True)
    assert _contents(into) == before


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
