"""A loaded leaf is what was saved: parameter, class, attributes, requires_grad, object. ``torch.load`` is the model."""

from __future__ import annotations

import io
import logging
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from stager import Checkpointer, UnloadableError, load_checkpoint
from stager.workers.checkpoint.formats import FORMATS


class Scaled(torch.Tensor):
    """A tensor with an attribute, as quantization and parallelism libraries have them."""

    scale: float


class Slotted(torch.Tensor):
    __slots__ = ("zero_point",)
    zero_point: int


class Restored(torch.Tensor):
    def __setstate__(self, state: Any) -> None:
        self.restored_from = dict(state)


class Fussy(torch.Tensor):
    """Overrides ``__torch_function__``, as torchvision's tensors do."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class Own(torch.Tensor):
    """Pickles itself."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _own, (self.as_subclass(torch.Tensor).tolist(),)


def _own(values: list[float]) -> Own:
    return torch.tensor(values).as_subclass(Own)


class Weight(nn.Parameter):
    """A subclass of Parameter, which ``torch.save`` makes a Parameter of."""


def _with(tensor: Any, **attributes: Any) -> Any:
    for name, value in attributes.items():
        setattr(tensor, name, value)
    return tensor


def _named() -> Any:
    return _with(torch.arange(6.0).as_subclass(Scaled), scale=0.5)


STATES: dict[str, Callable[[], Any]] = {
    "frozen and trained parameters": lambda: {
        "a": nn.Parameter(torch.randn(3), requires_grad=False),
        "b": nn.Parameter(torch.randn(2, 3)),
        "c": torch.randn(3),
    },
    "lists of parameters": lambda: list(nn.LSTM(3, 4).parameters()),
    "keep_vars": lambda: nn.BatchNorm1d(4).state_dict(keep_vars=True),
    "grad of a half": lambda: torch.randn(3, dtype=torch.float16).requires_grad_(),
    "parameter of an unusual dtype": lambda: nn.Parameter(torch.randn(3).to(torch.float8_e4m3fn)),
    "complex parameter": lambda: nn.Parameter(torch.randn(3, dtype=torch.complex64)),
    "not a leaf": lambda: torch.randn(3).requires_grad_() * 2,
    "buffer": lambda: nn.Buffer(torch.randn(3), persistent=False),
    "attributes of a tensor": lambda: {"x": _with(torch.randn(3), tp={"dim": 0, "shape": (2, 3)}), "y": torch.ones(2)},
    "attributes of a parameter": lambda: _with(nn.Parameter(torch.randn(3)), is_expert=True),
    "attribute that is a tensor": lambda: _with(nn.Parameter(torch.randn(3)), main=torch.randn(3)),
    "class of its own": _named,
    "class of its own, in a list": lambda: [torch.ones(2), _named()],
    "class of its own that is a parameter": lambda: nn.Parameter(_named()),
    "slots": lambda: _with(torch.randn(3).as_subclass(Slotted), zero_point=3),
    "setstate": lambda: _with(torch.randn(3).as_subclass(Restored), a=1),
    "torch_function": lambda: torch.randn(3).as_subclass(Fussy),
    "pickles itself": lambda: torch.randn(3).as_subclass(Own),
    "subclass of parameter": lambda: Weight(torch.randn(3)),
    "subclass of parameter with attributes": lambda: _with(Weight(torch.randn(3)), a=[1]),
    "large and of a class": lambda: torch.randn(600_000).as_subclass(Scaled),
    "permuted parameter": lambda: nn.Parameter(torch.randn(3, 4).t()),
    "channels last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "quantized with an attribute": lambda: _with(torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), a=1),
    "sparse parameter": lambda: nn.Parameter(torch.eye(3).to_sparse(), requires_grad=False),
    "attribute of an OrderedDict": lambda: _with(OrderedDict(w=torch.ones(2)), note=[1]),
    "metadata of a module": lambda: nn.Linear(2, 2).state_dict(),
}


def _save(run_dir: Path, kind: str, state: Any) -> str:
    with Checkpointer(run_dir, {"workers": {"count": 1}, "persistence": {"format": kind}}) as ckpt:
        return str(ckpt.save(0, {"x": state}).upload_completion.result(60).path)


def _through_torch(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save({"x": state}, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)["x"]


def facts(value: Any) -> Any:
    """What has to be equal."""
    if isinstance(value, torch.Tensor):
        plain: Any = value.detach() if value.is_sparse else value.detach().as_subclass(torch.Tensor)
        attributes = {name: facts(one) for name, one in vars(value).items()} | {
            name: getattr(value, name) for name in getattr(type(value), "__slots__", ()) if hasattr(value, name)
        }
        if plain.is_sparse or plain.is_quantized:
            strides, numbers = None, plain.to_dense() if plain.is_sparse else plain.int_repr()
        else:
            strides, numbers = plain.stride(), plain.to(torch.complex64 if plain.is_complex() else torch.float32)
        return type(value), value.dtype, value.requires_grad, strides, attributes, numbers.tolist()
    if isinstance(value, dict):
        return (
            type(value),
            [(key, facts(one)) for key, one in value.items()],
            dict(vars(value)) if vars_of(value) else {},
        )
    return [facts(one) for one in value] if isinstance(value, list) else value


def vars_of(value: Any) -> Any:
    return getattr(value, "__dict__", None)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[Any, str]]:
    """By name and format: each state, and the checkpoint of it. One worker for each format saves them all."""
    found = {}
    for kind in FORMATS:
        config = {"workers": {"count": 1}, "persistence": {"format": kind}}
        with Checkpointer(tmp_path_factory.mktemp(kind), config) as ckpt, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # quantized tensors are deprecated
            for step, (name, make) in enumerate(STATES.items()):
                state = make()
                found[name, kind] = state, str(ckpt.save(step, {"x": state}).upload_completion.result(60).path)
    return found


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("name", STATES)
def test_leaf_comes_back_as_torch_load_returns_it(
    name: str, kind: str, saved: dict[tuple[str, str], tuple[Any, str]]
) -> None:
    state, path = saved[name, kind]
    assert facts(load_checkpoint(path, allow_pickle=True).state["x"]) == facts(_through_torch(state))


@pytest.mark.parametrize("name", ["frozen and trained parameters", "keep_vars", "grad of a half", "not a leaf"])
def test_stock_torch_load_returns_parameters_under_weights_only_rules(name: str, run_dir: Path) -> None:
    state = STATES[name]()
    path = _save(run_dir, "torch", state)
    assert facts(torch.load(Path(path, "state.pt"), weights_only=True)["x"]) == facts(_through_torch(state))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_stock_dcp_load_finds_tensors_with_attributes_by_their_own_names(run_dir: Path, tmp_path: Path) -> None:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    state = {"list": [_named(), torch.ones(2)], "p": _with(nn.Parameter(torch.randn(3)), is_expert=True)}
    path = _save(run_dir, "dcp", state)
    into = {"x": {"list": [torch.zeros(6), torch.zeros(2)], "p": torch.zeros(3)}}
    dcp.load(into, checkpoint_id=path, no_dist=True)
    assert torch.equal(into["x"]["list"][0], torch.arange(6.0)) and torch.equal(into["x"]["p"], state["p"])
    dcp_to_torch_save(path, tmp_path / "whole.pt")
    assert torch.equal(torch.load(tmp_path / "whole.pt", weights_only=False)["x"]["p"], state["p"])


def test_metadata_of_any_content_and_still_a_module_takes_it(kind: str, run_dir: Path) -> None:
    source, target = nn.Linear(2, 2), nn.Linear(2, 2)
    state: Any = source.state_dict()
    state._metadata[""]["batch_size"] = (3,)
    path = _save(run_dir, kind, state)
    load_checkpoint(path, into={"x": target})
    assert torch.equal(target.weight, source.weight)
    metadata = load_checkpoint(path).state["x"]._metadata
    assert metadata[""] == ({"version": 1} if kind == "torch" else {"version": 1, "batch_size": (3,)})


def test_lazy_parameter_comes_back_lazy(kind: str, run_dir: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's warning that lazy modules are new
        layer = nn.LazyLinear(3)
    loaded = load_checkpoint(_save(run_dir, kind, layer.weight), allow_pickle=True).state["x"]
    assert type(loaded) is nn.UninitializedParameter and loaded.requires_grad


def test_grad_of_a_dtype_that_torch_cannot_load_with_grad(kind: str, run_dir: Path) -> None:
    weight = torch.randn(3).to(torch.float8_e4m3fn).requires_grad_()
    path = _save(run_dir, kind, weight)
    assert load_checkpoint(path).state["x"].requires_grad
    if kind == "torch":
        assert torch.load(Path(path, "state.pt"), weights_only=True)["x"].dtype is torch.float8_e4m3fn


def test_values_go_into_a_target_that_stays_what_it_is(kind: str, run_dir: Path) -> None:
    path = _save(run_dir, kind, {"a": nn.Parameter(torch.ones(3)), "b": torch.ones(3).requires_grad_()})
    target = {"a": torch.zeros(3), "b": nn.Parameter(torch.zeros(3), requires_grad=False)}
    a, b = target["a"], target["b"]
    load_checkpoint(path, into={"x": target})
    assert target["a"] is a and target["b"] is b and type(a) is torch.Tensor and not a.requires_grad
    assert type(b) is nn.Parameter and not b.requires_grad and torch.equal(a, b)


@pytest.mark.parametrize("kind", ["dcp", "safetensors"])
def test_values_of_a_class_that_is_not_allowed_still_go_into_a_module(kind: str, run_dir: Path) -> None:
    class Bad(nn.Linear):
        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            return {name: value.as_subclass(Scaled) for name, value in super().state_dict(*args, **kwargs).items()}

    source, target = Bad(2, 2), nn.Linear(2, 2)
    path = _save(run_dir, kind, source)
    load_checkpoint(path, into={"x": target})
    assert torch.equal(target.weight, source.weight)


@pytest.mark.parametrize("kind", ["dcp", "safetensors"])
def test_class_whose_setstate_raises_is_named_and_is_no_damage(
    kind: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _save(run_dir, kind, {"deep": [_with(torch.randn(3).as_subclass(Restored), a=1)]})

    def fail(self: Any, state: Any) -> None:
        raise KeyError("new_attribute")

    monkeypatch.setattr(Restored, "__setstate__", fail)
    with pytest.raises(UnloadableError, match=r"x\['deep'\]\[0\].*KeyError") as caught:
        load_checkpoint(path, allow_pickle=True)
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize("kind", ["dcp", "safetensors"])
def test_attribute_that_cannot_be_pickled_is_left_out_with_a_warning(
    kind: str, run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weight = _with(nn.Parameter(torch.randn(3)), hook=lambda: None)
    with caplog.at_level(logging.WARNING, "stager"):
        path = _save(run_dir, kind, {"w": weight})
    assert "x['w'] " not in caplog.text and "x.w (its class and attributes) cannot be pickled" in caplog.text
    loaded = load_checkpoint(path).state["x"]["w"]
    assert type(loaded) is nn.Parameter and torch.equal(loaded, weight) and not vars(loaded)


def test_tied_tensors_share_memory_and_one_object_stays_one(kind: str, run_dir: Path) -> None:
    one, other = nn.Parameter(torch.randn(3, 4)), torch.randn(5)
    state = {
        "same": [one, one],
        "data": one.data,
        "first": other,
        "second": other.view(5),
        "twice": [other.view(5)] * 2,
        "named": [_named()] * 2,
    }
    x = load_checkpoint(_save(run_dir, kind, state), allow_pickle=True).state["x"]
    assert x["same"][0] is x["same"][1] and type(x["data"]) is torch.Tensor
    assert x["same"][0].data_ptr() == x["data"].data_ptr()
    assert len({id(x["first"]), id(x["second"]), *map(id, x["twice"])}) == 3 and x["twice"][0] is x["twice"][1]
    assert len({t.data_ptr() for t in (x["first"], x["second"], *x["twice"])}) == 1
    x["first"].requires_grad_()
    assert not x["second"].requires_grad and not x["twice"][0].requires_grad
    if kind != "torch":  # which pickles a tensor of its own class whole, each time
        assert x["named"][0] is x["named"][1]


def test_what_changes_between_saves_of_one_plan_is_seen(kind: str, run_dir: Path) -> None:
    weight, state = torch.randn(4), {}
    views = [weight.view(4), weight.view(4)]
    with Checkpointer(run_dir, {"workers": {"count": 1}, "persistence": {"format": kind}}) as ckpt:

        def saved(step: int, **values: Any) -> Any:
            path = ckpt.save(step, {"x": {**state, **values}}).upload_completion.result(60).path
            return load_checkpoint(str(path)).state["x"]

        before = saved(0, a=views[0], b=views[1])
        assert before["a"] is not before["b"]
        same = saved(1, a=views[0], b=views[0])
        assert same["a"] is same["b"]
        views[0].requires_grad_()
        trained = saved(2, a=views[0], b=views[1])
        assert trained["a"].requires_grad and not trained["b"].requires_grad
        assert saved(3, a=views[0], b=_with(views[1], note="new"))["b"].note == "new"


def test_plain_state_has_the_structure_that_it_had_before(kind: str, run_dir: Path) -> None:
    from stager.workers.checkpoint.directory.manifest_file import read_manifest

    weight = torch.ones(3)
    path = _save(run_dir, kind, {"a": weight, "b": weight.view(3), "c": [torch.ones(2), 5]})
    structure = read_manifest(path).layout.structure
    (x,) = structure[2]
    assert x[:2] == ["dict", ["a", "b", "c"]] and x[2][0] == x[2][1]
    assert all(type(node) is int for node in [*x[2][:2], *x[2][2][1]])
