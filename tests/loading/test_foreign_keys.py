"""Keys and containers that a format of others has lost: they are taken from what is loaded into."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.state_dict import get_state_dict

from stager import StateMismatchError, UnloadableError, UnsafePickleError, UsageError, load_checkpoint
from tests.loading.restoring import contents
from tests.states import same

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def save_dcp(path: Path, state: dict[str, Any], *, flat: bool = False) -> Path:
    planner = DefaultSavePlanner(flatten_state_dict=not flat)
    dcp.save(state, checkpoint_id=path, planner=planner, no_dist=True)
    return path


def small_model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.randn(5, 4)).sum().backward()
    optimizer.step()


OPTIMIZERS = [
    lambda parameters: torch.optim.Adam(parameters, lr=0.1),
    lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    lambda parameters: torch.optim.Adagrad(parameters, lr=0.1),
]


@pytest.mark.parametrize("has_made_a_step", [False, True])
@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("steps", [0, 1])
def test_an_optimizer_gets_the_state_that_it_had_if_it_had_one(
    tmp_path: Path, make: Any, steps: int, has_made_a_step: bool
) -> None:
    model = small_model()
    optimizer = make(model.parameters())
    for _ in range(steps):
        step(model, optimizer)
    path = save_dcp(tmp_path / "stock", {"model": model, "optimizer": optimizer})
    other = small_model()
    into = {"model": other, "optimizer": make(other.parameters())}
    into["optimizer"].param_groups[0]["lr"] = 0.5
    if has_made_a_step:
        step(other, into["optimizer"])
    assert load_checkpoint(path, into).missing == ()
    assert same(dict(other.state_dict()), dict(model.state_dict()))
    assert same(into["optimizer"].state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("has_stepped", [False, True])
@pytest.mark.parametrize("name", ["", "block"])
def test_an_optimizer_whose_states_have_the_names_of_parameters(
    tmp_path: Path, name: str, has_stepped: bool, flat: bool
) -> None:
    """As torch's ``get_state_dict`` makes them: such names have dots, and may begin with a number."""

    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        model = nn.ModuleDict({name: model})[name] if name else model
        whole = nn.ModuleDict({name: model}) if name else model
        return whole, torch.optim.AdamW(whole.parameters(), lr=0.1)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        (model[name] if name else model)(torch.randn(5, 4)).sum().backward()  # type: ignore[index]  # a ModuleDict if it has a name
        optimizer.step()

    model, optimizer = make()
    train(model, optimizer)
    model_state, state = get_state_dict(model, optimizer)
    if flat:
        state = {
            **{f"state.{key}.{one}": value for key, values in state["state"].items() for one, value in values.items()},
            "param_groups": state["param_groups"],
        }
    path = save_dcp(tmp_path / "dcp", {"model": model_state, "optimizer": state})
    into = make()
    if has_stepped:
        train(*into)
    loaded = load_checkpoint(path, into={"model": into[0], "optimizer": into[1]})
    assert loaded.missing == loaded.unexpected == ()
    assert same(into[0].state_dict(), model.state_dict())
    assert same(into[1].state_dict(), optimizer.state_dict())


def test_states_of_an_optimizer_that_belong_to_none_of_its_parameters_are_refused(tmp_path: Path) -> None:
    """torch takes them, and begins with states of zero."""
    model = small_model()
    optimizer = torch.optim.Adam(model.parameters())
    step(model, optimizer)
    state = optimizer.state_dict()
    state["state"] = {number + 10: value for number, value in state["state"].items()}
    torch.save({"optimizer": state}, tmp_path / "a.pt")
    with pytest.raises(UnloadableError, match=r"^optimizer: .*none of them belong together"):
        load_checkpoint(tmp_path / "a.pt", into={"optimizer": optimizer})


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


class Counts:
    """As a data loader: its state has numbers as keys."""

    def __init__(self, counts: dict[int, int]) -> None:
        self.counts = counts

    def state_dict(self) -> dict[str, Any]:
        return {"counts": self.counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counts = state["counts"]


def test_an_object_gets_its_keys_as_it_has_them(tmp_path: Path) -> None:
    path = save_dcp(tmp_path / "stock", {"loader": Counts({3: 1, 4: 2})})
    loader = Counts({3: 0})
    load_checkpoint(path, {"loader": loader})
    assert loader.counts == {3: 1, 4: 2}


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


@dataclasses.dataclass(frozen=True)
class Unknown:
    n: int


def test_an_object_that_needs_permission_is_read_only_if_it_is_asked_for(tmp_path: Path) -> None:
    path = save_dcp(tmp_path / "stock", {"w": torch.ones(2), "o": {Unknown(3)}, "n": 3})
    w = torch.zeros(2)
    load_checkpoint(path, {"w": w, "n": 0})
    assert w.all()
    w.zero_()
    with pytest.raises(UnsafePickleError, match=r"o in .* allow_pickle"):
        load_checkpoint(path, {"w": w, "o": None})
    assert not w.any()
    assert load_checkpoint(path, {"w": w, "o": None}, allow_pickle=True).state["o"] == {Unknown(3)}


class Gone:
    """Its class is not there any more when it is loaded."""


@pytest.mark.parametrize("kind", ["dcp", "torch.save", "no archive"])
def test_an_object_that_cannot_be_made_is_told_and_nothing_is_changed(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, state = tmp_path / "saved", {"w": torch.ones(2), "deep": {"o": Gone()}}
    if kind == "dcp":
        save_dcp(path, state)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "torch.save")
    monkeypatch.delattr(f"{__name__}.Gone")
    w = torch.zeros(2)
    with pytest.raises(UnloadableError, match="Gone") as raised:
        load_checkpoint(path, {"w": w, "deep": {"o": None}}, allow_pickle=True)
    assert not w.any()
    if kind == "dcp":  # the others are one pickle
        assert raised.value.key_path == "deep.o"
        load_checkpoint(path, {"w": w, "deep": {"o": None}}, keys="w")
        assert w.all()


class Refuses(Counts):
    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise ValueError("not this one")


@pytest.mark.parametrize("kind", ["dcp", "torch.save"])
def test_a_load_state_dict_that_raises_is_told_with_its_key_path(tmp_path: Path, kind: str) -> None:
    path, state = tmp_path / "saved", {"w": torch.ones(2), "deep": {"loader": {"counts": {3: 1}}}}
    torch.save(state, path) if kind == "torch.save" else save_dcp(path, state)
    with pytest.raises(
        UnloadableError, match=r"Refuses\.load_state_dict\(\) raised ValueError: not this one"
    ) as raised:
        load_checkpoint(path, {"w": torch.zeros(2), "deep": {"loader": Refuses({3: 0})}})
    assert raised.value.key_path == "deep['loader']" and isinstance(raised.value.__cause__, ValueError)


@pytest.mark.parametrize("kind", ["dcp", "torch.save", "no archive", "safetensors", "stager"])
@pytest.mark.parametrize("is_itself", [False, True])
def test_one_object_is_filled_from_its_own_state_dict_or_its_entry(tmp_path: Path, kind: str, is_itself: bool) -> None:
    from tests.persistence.tasks import save

    model = small_model()
    state: dict[str, Any] = dict(model.state_dict()) if is_itself else {"model": model.state_dict(), "n": torch.ones(1)}
    path = tmp_path / "saved"
    if kind == "dcp":
        save_dcp(path, state)
    elif kind == "safetensors":
        names = state if is_itself else {f"model.{name}": one for name, one in model.state_dict().items()}
        safetensors.torch.save_file(names, path)
    elif kind == "stager":
        path = Path(save(tmp_path / "run", state).path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "torch.save")
    other = small_model()
    assert load_checkpoint(path, other).state is other
    assert same(dict(other.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("steps", [0, 1])
def test_one_optimizer_is_filled_from_its_entry(tmp_path: Path, steps: int) -> None:
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        step(model, optimizer)
    path = save_dcp(tmp_path / "stock", {"model": model, "optimizer": optimizer})
    other = torch.optim.AdamW(small_model().parameters())
    load_checkpoint(path, other)
    assert same(other.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("kind", ["dcp", "torch.save", "safetensors"])
def test_the_state_dict_of_one_object_is_not_taken_for_a_mapping_of_names(tmp_path: Path, kind: str) -> None:
    model, path = small_model(), tmp_path / "saved"
    if kind == "dcp":
        save_dcp(path, dict(model.state_dict()))
    elif kind == "safetensors":
        safetensors.torch.save_file(dict(model.state_dict()), path)
    else:
        torch.save(model.state_dict(), path)
    target = {"model": small_model()}
    before = contents(target)
    with pytest.raises(UsageError, match=r"no 'model'.* 0\.weight, 0\.bias, .* load_checkpoint\(path, into=model\)"):
        load_checkpoint(path, target)
    assert contents(target) == before


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
    with pytest.raises(UnsafePickleError, match=r"load_checkpoint\(path, allow_pickle=True\), without into and keys"):
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
