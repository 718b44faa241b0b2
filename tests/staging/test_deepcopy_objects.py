"""Objects that are hard to copy: the engine does what ``copy.deepcopy`` does, with their tensors staged."""

from __future__ import annotations

import collections
import copy
import copyreg
import functools
import types
import weakref
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from stager.torch_api.staging.state_dict_stager import StateDictStager
from stager.workers.errors import UnstageableError
from tests.staging.compare import assert_private_copy, assert_same
from tests.staging.conftest import Stage


class Pair(NamedTuple):
    tensor: torch.Tensor
    other: Any = None


class StringSlot:
    __slots__ = "tensor"  # noqa: PLC0205  # the case itself: a string, not a tuple


class InheritedSlots(StringSlot):
    __slots__ = ("extra",)


class SlotsAndDict(InheritedSlots):
    pass


@dataclass(frozen=True)
class Frozen:
    tensor: torch.Tensor
    inner: Frozen | None = None


@dataclass(frozen=True, slots=True)
class FrozenSlots:
    tensor: torch.Tensor
    names: list[str] = field(default_factory=list)


class Registered:
    """Copied through copyreg's table."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


copyreg.pickle(Registered, lambda value: (Registered, (value.tensor,)))


class WithState:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.loaded = False

    def __getstate__(self) -> dict[str, Any]:
        return {"t": self.tensor}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.tensor, self.loaded = state["t"], True


class Growing(collections.UserList[Any]):
    pass


class Tagged(dict[str, Any]):
    """A dict with attributes."""


def test_slots_given_as_a_string_and_inherited(stage: Stage) -> None:
    source = SlotsAndDict()
    source.tensor, source.extra, source.free = torch.ones(2), [torch.zeros(1)], "x"
    staged = stage(source)
    assert type(staged) is SlotsAndDict
    assert_private_copy([source.tensor, source.extra, source.free], [staged.tensor, staged.extra, staged.free])


@pytest.mark.parametrize(
    "source",
    [
        Frozen(torch.ones(2), Frozen(torch.zeros(3))),
        FrozenSlots(torch.ones(2), ["a"]),
        Pair(torch.ones(2), Pair(torch.zeros(1))),
        collections.OrderedDict(b=torch.ones(1), a=torch.zeros(2)),
        collections.defaultdict(list, {"k": [torch.ones(1)]}),
        collections.deque([torch.ones(1), 2], maxlen=3),
        Growing([torch.ones(2), 1]),
        Registered(torch.ones(2)),
        types.SimpleNamespace(a=torch.ones(1), b={"c": (torch.ones(2),)}),
        {"set": {1, "a"}, "frozen": frozenset({2}), "range": range(3), "ellipsis": ..., "bytes": b"x"},
        [torch.Size([2, 3]), torch.float16, torch.device("cpu"), torch.strided],
    ],
    ids=lambda source: type(source).__name__,
)
def test_equals_deepcopy_and_is_private(source: Any, stage: Stage) -> None:
    staged = stage(source)
    assert_same(copy.deepcopy(source), staged)
    assert_private_copy(source, staged)


def test_state_hooks_are_used(stage: Stage) -> None:
    staged = stage(WithState(torch.ones(2)))
    assert staged.loaded
    assert staged.tensor.tolist() == [1, 1]


def test_dict_subclass_keeps_items_and_attributes(stage: Stage) -> None:
    source = Tagged(w=torch.ones(2))
    source.version = [3]
    staged = stage(source)
    assert type(staged) is Tagged
    assert_private_copy(source["w"], staged["w"])
    assert staged.version == [3]
    assert staged.version is not source.version


def test_defaultdict_still_has_its_default(stage: Stage) -> None:
    staged = stage(collections.defaultdict(list, k=[torch.ones(1)]))
    assert staged["new"] == []


def test_cycles_through_every_mutable_container(stage: Stage) -> None:
    source: dict[str, Any] = {"w": torch.ones(2)}
    source["self"] = source
    source["list"] = [source]
    source["tuple"] = (source["list"], source)
    source["object"] = types.SimpleNamespace(root=source)
    source["deque"] = collections.deque([source["tuple"]])
    staged = stage(source)
    assert staged["self"] is staged["list"][0] is staged["tuple"][1] is staged["object"].root is staged
    assert staged["deque"][0] is staged["tuple"]
    assert staged["tuple"][0] is staged["list"]


def test_tuple_that_contains_itself(stage: Stage) -> None:
    inner: list[Any] = [torch.ones(1)]
    source = (inner,)
    inner.append(source)
    staged = stage(source)
    assert staged[0][1] is staged


def test_tensor_that_refers_to_itself(stage: Stage) -> None:
    source = torch.ones(2)
    source.me = [source]
    staged = stage(source)
    assert staged.me[0] is staged


def test_unchanged_tuple_is_shared_as_deepcopy_shares_it() -> None:
    source = (1, ("a", 2.0))
    assert StateDictStager().stage([source])[0] is source


def test_bound_method_is_bound_to_the_copy(stage: Stage) -> None:
    source = WithState(torch.ones(2))
    staged = stage({"call": source.__getstate__, "owner": source})
    assert staged["call"].__self__ is staged["owner"]


def test_partial_carries_staged_tensors(stage: Stage) -> None:
    source = functools.partial(max, torch.ones(2), key=len)
    staged = stage(source)
    assert staged.args[0].data_ptr() != source.args[0].data_ptr()
    assert staged.func is max


def test_functions_types_and_weak_references_are_shared(stage: Stage) -> None:
    target = WithState(torch.ones(1))
    source = {"lambda": lambda x: x, "type": WithState, "weak": weakref.ref(target), "builtin": len}
    staged = stage(source)
    assert all(staged[key] is source[key] for key in source)


def test_lr_scheduler_with_lambdas(stage: Stage) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda epoch: 0.9**epoch])
    optimizer.step()
    scheduler.step()
    staged = stage({"model": model, "optimizer": optimizer, "scheduler": scheduler.state_dict()})
    expected = copy.deepcopy({"scheduler": scheduler.state_dict()})
    assert staged["scheduler"].keys() == expected["scheduler"].keys()
    assert staged["optimizer"].param_groups[0]["params"][0] is staged["model"].weight
    assert type(staged["model"].weight) is torch.nn.Parameter
    assert_private_copy(dict(model.named_parameters()), dict(staged["model"].named_parameters()))


def test_module_runs_after_staging(stage: Stage) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    model[1].register_forward_hook(lambda *_: None)
    staged = stage(model)
    x = torch.randn(5, 3)
    assert torch.equal(staged.eval()(x), model.eval()(x))


class Cloning:
    """Its ``__deepcopy__`` makes the tensors by itself."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __deepcopy__(self, memo: dict[int, Any]) -> Cloning:
        return Cloning(self.tensor.clone())


class Selective:
    """Its ``__deepcopy__`` leaves out what it does not want."""

    def __init__(self, wanted: Any, cache: Any) -> None:
        self.wanted, self.cache = wanted, cache

    def __deepcopy__(self, memo: dict[int, Any]) -> Selective:
        return Selective(copy.deepcopy(self.wanted, memo), None)


class Shared:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __deepcopy__(self, memo: dict[int, Any]) -> Shared:
        return self


class TestObjectsThatCopyThemselves:
    def test_tensors_asked_for_are_staged_and_aliased(self, stage: Stage) -> None:
        base = torch.arange(6.0)
        source = [Selective({"view": base[2:], "deep": [(base,)]}, None), base]
        staged = stage(source, share_memory=True)
        assert staged[0].wanted["deep"][0][0] is staged[1]
        assert staged[0].wanted["view"].is_shared()
        assert_private_copy(source[0].wanted, staged[0].wanted)

    def test_tensors_it_does_not_want_are_not_staged(self) -> None:
        stager = StateDictStager()
        source = Selective(torch.ones(2), torch.ones(1000))
        stager.stage(source)
        assert [s.nbytes() for s in stager._cached_storage_mapping.values()] == [8]

    def test_tensors_it_makes_are_moved_into_staged_memory(self, stage: Stage) -> None:
        source = Cloning(torch.ones(3))
        staged = stage([source], share_memory=True)[0]
        assert staged.tensor.is_shared()
        assert_private_copy(source.tensor, staged.tensor)

    def test_object_that_returns_itself_is_shared(self, stage: Stage) -> None:
        source = Shared(torch.ones(2))
        assert stage({"o": source})["o"] is source

    def test_inside_a_callers_own_memo(self) -> None:
        shared = torch.ones(2)
        memo: dict[int, Any] = {}
        staged = StateDictStager().deepcopy_with_tensor_offload([shared, Selective(shared, None)], memo)
        assert staged[1].wanted is staged[0]
        assert memo[id(shared)] is staged[0]

    def test_numpy_arrays_of_objects(self, stage: Stage) -> None:
        source = np.array([torch.ones(2), {"t": torch.zeros(3)}, 4], dtype=object)
        staged = stage({"a": source, "plain": np.arange(3)}, share_memory=True)
        assert staged["a"][0].is_shared()
        assert staged["a"][1]["t"].is_shared()
        assert staged["plain"].tolist() == [0, 1, 2]

    def test_its_error_names_the_key(self, stage: Stage) -> None:
        with pytest.raises(UnstageableError, match=r"a: .*Selective cannot be copied"):
            stage({"a": Selective(types, None)})


class TestKeyPaths:
    def bad(self) -> Any:
        return types  # a module: copy.deepcopy cannot copy it either

    def path(self, stage: Stage, source: Any) -> str:
        with pytest.raises(UnstageableError) as caught:
            stage(source)
        assert str(caught.value).startswith(caught.value.key_path + ": ")
        return caught.value.key_path

    def test_of_each_container(self, stage: Stage) -> None:
        bad = self.bad()
        assert self.path(stage, bad) == "state_dict"
        assert self.path(stage, {"optimizer": {"state": {3: {"exp_avg": bad}}}}) == "optimizer['state'][3]['exp_avg']"
        assert self.path(stage, [1, [bad]]) == "state_dict[1][0]"
        assert self.path(stage, {"t": (1, Pair(bad))}) == "t[1].tensor"
        assert self.path(stage, {"o": collections.OrderedDict(a=1, b=bad)}) == "o['b']"
        assert self.path(stage, {"d": collections.deque([1, bad])}) == "d[1]"
        assert self.path(stage, {"f": Frozen(bad)}) == "f.tensor"
        assert self.path(stage, {"p": functools.partial(max, bad)}) == "p[1][0]"
        assert self.path(stage, {"m": types.MethodType(len, types.SimpleNamespace(x=bad))}) == "m.__self__.x"

    def test_of_objects_attributes_and_slots(self, stage: Stage) -> None:
        class Optimizer:
            def __init__(self, state: Any) -> None:
                self.state = state

        assert (
            self.path(stage, {"optimizer": Optimizer({3: {"exp_avg": self.bad()}})}) == "optimizer.state[3]['exp_avg']"
        )
        slotted = InheritedSlots()
        slotted.tensor = self.bad()
        assert self.path(stage, {"s": slotted}) == "s.tensor"

    def test_of_a_tensors_attribute(self, stage: Stage) -> None:
        tensor = torch.ones(1)
        tensor.note = {"x": self.bad()}
        assert self.path(stage, {"w": tensor}) == "w.note['x']"

    def test_of_a_tensor_that_was_freed(self, stage: Stage) -> None:
        freed = torch.ones(4)
        freed.untyped_storage().resize_(0)
        assert self.path(stage, {"layer.weight": freed}) == "layer.weight"

    def test_survives_pickling_with_its_cause_at_hand(self, stage: Stage) -> None:
        import pickle

        with pytest.raises(UnstageableError) as caught:
            stage({"a": [self.bad()]})
        assert isinstance(caught.value.__cause__, TypeError)
        again = pickle.loads(pickle.dumps(caught.value))
        assert (again.key_path, again.reason) == (caught.value.key_path, caught.value.reason)

    def test_too_deep_is_shortened(self, stage: Stage) -> None:
        source: Any = self.bad()
        for _ in range(100):
            source = [source]
        assert "..." in self.path(stage, source)


def test_nothing_is_returned_and_the_stager_works_after_a_failure() -> None:
    stager = StateDictStager()
    with pytest.raises(UnstageableError):
        stager.stage({"w": torch.ones(2), "bad": types})
    assert stager.stage({"w": torch.ones(2)})["w"].tolist() == [1, 1]
