"""Keys and containers that a format of others has lost: they are taken from what is loaded into."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from stager import StateMismatchError, UnsafePickleError, UsageError, load_checkpoint
from tests.loading.foreign_files import save_dcp, small_model
from tests.loading.restoring import contents
from tests.states import same

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def test_what_has_no_value_is_not_missing(tmp_path: Path) -> None:
    """DCP writes nothing for it."""
    state = {"loss": nn.CrossEntropyLoss(), "empty": {}, "deep": {"a": {"b": {}}, "n": 1}, "list": [], "tuple": ()}
    path = save_dcp(tmp_path / "stock", state)
    into: dict[str, Any] = {
        "loss": nn.CrossEntropyLoss(),
        "empty": {},
        "deep": {"a": {"b": {}}, "n": 2},
        "list": [3],
        "tuple": (4,),
    }
    assert load_checkpoint(path, into).missing == ()
    assert {**into, "loss": 0} == {"loss": 0, "empty": {}, "deep": {"a": {"b": {}}, "n": 1}, "list": [], "tuple": ()}
    with pytest.raises(StateMismatchError, match="model: is in the target but not in the checkpoint"):
        load_checkpoint(path, {"deep": {}, "model": small_model()})


def test_keys_have_the_types_of_the_target(tmp_path: Path) -> None:
    state = {
        "numbers": {1: torch.ones(2), 20: torch.zeros(2), -3: 5},
        "mixed": {1: torch.ones(1), "1x": 2, None: 3, 2.5: 4},
        "texts": {"1": torch.ones(1), "2": torch.ones(2)},
        "ordered": OrderedDict({7: torch.ones(1)}),
    }
    path = save_dcp(tmp_path / "stock", state)
    assert list(load_checkpoint(path).state["numbers"]) == ["1", "20", "-3"]
    into: dict[str, Any] = {
        "numbers": {1: torch.zeros(2), 20: torch.ones(2), -3: 0},
        "mixed": {1: torch.zeros(1), "1x": 0, None: 0, 2.5: 0},
        "texts": {"1": torch.zeros(1), "2": torch.zeros(2)},
        "ordered": OrderedDict({7: torch.zeros(1)}),
    }
    one = into["numbers"][1]
    load_checkpoint(path, into)
    assert into["numbers"][1] is one and type(into["ordered"]) is OrderedDict
    assert all(same(dict(into[name]), dict(value)) for name, value in state.items())


def test_a_number_that_the_target_lacks_is_one_where_its_keys_are_numbers(tmp_path: Path) -> None:
    path = save_dcp(tmp_path / "stock", {"a": {1: 10, 2: 20, -3: 30}, "b": {"x": 1, "2": 2}})
    into: dict[str, Any] = {"a": {2: 0}, "b": {"x": 0}}
    load_checkpoint(path, into)
    assert into == {"a": {1: 10, 2: 20, -3: 30}, "b": {"x": 1, "2": 2}}
    assert list(into["a"]) == [1, 2, -3] and list(into["b"]) == ["x", "2"]  # in the order of the checkpoint


NESTED = {"model": {"0.weight": torch.randn(3, 2), "0.bias": torch.randn(3)}, "list": [torch.ones(1), torch.ones(2)]}


@pytest.fixture(params=["dcp", "safetensors"])
def names_only(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoint without nesting: names, joined by dots."""
    names = {f"model.{name}": tensor for name, tensor in NESTED["model"].items()}
    names |= {f"list.{number}": tensor for number, tensor in enumerate(NESTED["list"])}
    if request.param == "dcp":
        return save_dcp(tmp_path / "flat", names, flat=True)
    safetensors.torch.save_file(names, tmp_path / "flat")
    return tmp_path / "flat"


def test_names_joined_by_dots_are_nested_as_the_target_is(names_only: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 3))
    weight = model[0].weight
    into: dict[str, Any] = {"model": model, "list": [torch.zeros(1), torch.zeros(2)]}
    load_checkpoint(names_only, into)
    assert model[0].weight is weight and same(into["list"], NESTED["list"])
    assert same(dict(model.state_dict()), NESTED["model"])
    plain: dict[str, Any] = {"model": {"0": {"weight": torch.zeros(3, 2), "bias": torch.zeros(3)}}}
    load_checkpoint(names_only, plain)
    assert same(plain["model"]["0"]["weight"], NESTED["model"]["0.weight"])
    flat = {"model.0.weight": torch.zeros(3, 2)}
    load_checkpoint(names_only, flat)
    assert same(flat["model.0.weight"], NESTED["model"]["0.weight"])


def test_only_what_is_asked_for_is_read(names_only: Path) -> None:
    loaded = load_checkpoint(names_only, keys="list.*").state
    assert sorted(loaded) == ["list.0", "list.1"]
    into = {"model": {"0.weight": torch.zeros(3, 2), "0.bias": torch.zeros(3)}}
    load_checkpoint(names_only, into, keys="model.*.bias")
    assert same(into["model"]["0.bias"], NESTED["model"]["0.bias"]) and not into["model"]["0.weight"].any()
    with pytest.raises(StateMismatchError, match="optimizer"):
        load_checkpoint(names_only, keys=["list.*", "optimizer"])


@pytest.mark.parametrize("kind", ["dcp", "torch.save", "safetensors"])
def test_names_of_a_wrapped_module(tmp_path: Path, kind: str) -> None:
    model, path = small_model(), tmp_path / "saved"
    wrapped = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    if kind == "dcp":
        save_dcp(path, {"model": wrapped})
    elif kind == "safetensors":
        safetensors.torch.save_file({f"model.{name}": tensor for name, tensor in wrapped.items()}, path)
    else:
        torch.save({"model": wrapped}, path)
    other = small_model()
    before = contents(other)
    with pytest.raises(StateMismatchError, match=r"strip_prefix='module\.'"):
        load_checkpoint(path, {"model": other}, strict=False)
    assert contents(other) == before
    load_checkpoint(path, {"model": other}, strip_prefix="module.")
    assert same(dict(other.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("strict", [True, False])
def test_file_that_is_the_state_dict_of_a_wrapped_module(tmp_path: Path, strict: bool) -> None:
    model, other = small_model(), small_model()
    path = tmp_path / "ddp.pt"
    torch.save({f"module.{name}": tensor for name, tensor in model.state_dict().items()}, path)
    before = contents(other)
    with pytest.raises(StateMismatchError, match=r"pass strip_prefix='module\.'"):
        load_checkpoint(path, other, strict)
    with pytest.raises(UsageError, match=r"pass strip_prefix='module\.', with the \w+ itself as into=m"):
        load_checkpoint(path, {"m": other}, strict)
    assert contents(other) == before
    load_checkpoint(path, other, strict, strip_prefix="module.")
    assert same(dict(other.state_dict()), dict(model.state_dict()))


def test_tuple_as_a_key_of_dcp(tmp_path: Path) -> None:
    path = save_dcp(tmp_path / "stock", {"a": {(1, 2): torch.ones(1), "k": torch.ones(1)}})
    tensor = torch.zeros(1)
    into: dict[str, Any] = {"a": {(1, 2): tensor, "k": torch.zeros(1)}}
    loaded = load_checkpoint(path, into)
    assert into["a"][(1, 2)] is tensor and tensor.all() and set(into["a"]) == {(1, 2), "k"}
    assert loaded.missing == loaded.unexpected == ()


def test_keys_that_differ_in_their_type_only(tmp_path: Path) -> None:
    torch.save({"a": {"(1, 2)": torch.ones(1), "k": torch.ones(1)}}, tmp_path / "a.pt")
    with pytest.raises(
        StateMismatchError, match=r"the key \(1, 2\) is of type tuple in the target, and str in the checkpoint"
    ):
        load_checkpoint(tmp_path / "a.pt", {"a": {(1, 2): torch.zeros(1)}})


def test_module_that_torch_saved_whole(tmp_path: Path) -> None:
    path, model = tmp_path / "whole.pt", small_model()
    torch.save(model, path)
    advice = r"load_checkpoint\(path, allow_pickle=True\), without the arguments into and keys"
    with pytest.raises(UnsafePickleError, match=advice):
        load_checkpoint(path, small_model())
    with pytest.raises(
        UsageError, match=r"without into and keys, by load_checkpoint\(path, allow_pickle=True\)\.state"
    ):
        load_checkpoint(path, small_model(), allow_pickle=True)
    state = load_checkpoint(path, allow_pickle=True).state
    assert same(dict(state.state_dict()), dict(model.state_dict()))


def test_a_prefix_of_all_names(tmp_path: Path) -> None:
    model = small_model()
    names = {f"module.model.{name}": tensor for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(names, tmp_path / "saved")
    other = small_model()
    load_checkpoint(tmp_path / "saved", {"model": other}, strip_prefix="module.")
    assert same(dict(other.state_dict()), dict(model.state_dict()))
    numbers = save_dcp(tmp_path / "numbers", {"module.n": {1: torch.ones(1)}, "d": {2: 5}})
    into = {"n": {1: torch.zeros(1)}, "e": {2: 0}}
    load_checkpoint(numbers, into, strip_prefix="module.", rename={"d": "e"})
    assert same(into, {"n": {1: torch.ones(1)}, "e": {2: 5}})


@pytest.mark.parametrize("kind", ["dcp", "torch.save", "safetensors"])
def test_missing_and_unexpected_are_told(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "saved"
    state = {"model": {"a.w": torch.ones(2), "b.w": torch.ones(3)}, "other": torch.ones(1)}
    if kind == "dcp":
        save_dcp(path, state)
    elif kind == "safetensors":
        names = {f"model.{name}": tensor for name, tensor in state["model"].items()}  # type: ignore[union-attr]  # this state has a model
        safetensors.torch.save_file({**names, "other": torch.ones(1)}, path)
    else:
        torch.save(state, path)
    model = nn.ModuleDict({"a": nn.Module(), "c": nn.Module()})
    for module in model.values():
        module.w = nn.Parameter(torch.zeros(2))
    target = {"model": model, "scheduler": torch.zeros(1)}
    before = contents(target)
    with pytest.raises(StateMismatchError) as raised:
        load_checkpoint(path, target)
    assert contents(target) == before
    for name in ("scheduler", "model['c.w']", "model['b.w']"):
        assert f"{name}: is in the" in str(raised.value)
    loaded = load_checkpoint(path, target, strict=False)
    assert set(loaded.missing) == {"scheduler", "model.c.w"}
    assert set(loaded.unexpected) == {"model.b.w", "other"} and model["a"].w.all()


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("kind", ["safetensors", "renamed"])
def test_list_of_which_an_element_is_missing(tmp_path: Path, kind: str, strict: bool) -> None:
    path, rename = tmp_path / "a.safetensors", None
    names = {"x.1": torch.ones(2), "x.2": torch.ones(1)}
    if kind == "renamed":
        names, rename = {f"y{name}": tensor for name, tensor in names.items()}, {"yx.1": "x.1", "yx.2": "x.2"}
    safetensors.torch.save_file(names, path)
    first, second, third = torch.zeros(2) - 1, torch.zeros(2), torch.zeros(1)
    items = [first, second, third]
    into: dict[str, Any] = {"x": items}
    if strict:
        with pytest.raises(StateMismatchError, match=r"x\[0\]: is in the target but not in the checkpoint"):
            load_checkpoint(path, into, rename=rename)
        assert not second.any()
        return
    loaded = load_checkpoint(path, into, strict=False, rename=rename)
    assert loaded.missing == ("x.0",) and loaded.replaced == loaded.unexpected == ()
    assert into["x"] is items and items[0] is first and items[1] is second and items[2] is third
    assert first.tolist() == [-1, -1] and second.tolist() == [1, 1] and third.tolist() == [1]


def test_positions_of_a_list_without_a_value(tmp_path: Path) -> None:
    path = save_dcp(tmp_path / "stock", {"list": [{}, {"n": 1}, torch.ones(1)]})
    assert same(load_checkpoint(path).state, {"list": [{}, {"n": 1}, torch.ones(1)]})
    into: dict[str, Any] = {"list": [{}, {"n": 0}, torch.zeros(1)]}
    load_checkpoint(path, into)
    assert same(into, {"list": [{}, {"n": 1}, torch.ones(1)]})


def test_a_mapping_that_is_no_dict(tmp_path: Path) -> None:
    path = save_dcp(tmp_path / "stock", {"d": {1: torch.ones(1), 2: 3}})
    into = {"d": defaultdict(list, {1: torch.zeros(1)})}
    load_checkpoint(path, into)
    assert same(dict(into["d"]), {1: torch.ones(1), 2: 3})
