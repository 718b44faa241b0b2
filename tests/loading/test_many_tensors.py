"""Many tensors at once: each that takes bytes as they are gets them, each that does not gets its values or its message."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from stager import CorruptCheckpointError, StateMismatchError
from stager.loading.direct_targets import DirectTargets
from stager.workers.checkpoint.layout.items import Item, Items
from stager.workers.checkpoint.layout.layout import contiguous_stride
from tests.loading.restoring import contents, restore
from tests.persistence.tasks import restorer, save
from tests.states import bits

SHAPE = (2, 3, 4, 5)


def with_freed_memory(nbytes: int) -> torch.Tensor:
    tensor = torch.zeros(SHAPE)
    tensor.untyped_storage().resize_(nbytes)
    return tensor


def marked() -> torch.Tensor:
    tensor = torch.zeros(SHAPE)
    tensor.global_shape = torch.Size(SHAPE)  # type: ignore[attr-defined]  # a tensor that has it is a shard
    return tensor


def fake() -> torch.Tensor:
    with FakeTensorMode():
        return torch.zeros(SHAPE)


def of_inference() -> torch.Tensor:
    with torch.inference_mode():
        return torch.zeros(SHAPE)


class Subclass(torch.Tensor):
    """A tensor class of the user's."""


DIRECT: dict[str, Callable[[], torch.Tensor]] = {
    "plain": lambda: torch.zeros(SHAPE),
    "parameter": lambda: nn.Parameter(torch.zeros(SHAPE)),
    "requires grad": lambda: torch.zeros(SHAPE, requires_grad=True),
    "of inference": of_inference,
    "at an offset": lambda: torch.zeros(7 + 120)[7:].view(SHAPE),
}
OTHERS: dict[str, Callable[[], torch.Tensor]] = {
    "channels last": lambda: torch.zeros(SHAPE).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.zeros(5, 4, 3, 2).permute(3, 2, 1, 0),
    "expanded": lambda: torch.zeros(()).expand(SHAPE),
    "negative": lambda: torch._neg_view(torch.zeros(SHAPE)),
    "another shape": lambda: torch.zeros(3, 2, 4, 5),
    "another dtype": lambda: torch.zeros(SHAPE, dtype=torch.float64),
    "conjugate": lambda: torch.zeros(SHAPE, dtype=torch.complex64).conj(),
    "meta": lambda: torch.zeros(SHAPE, device="meta"),
    "freed": lambda: with_freed_memory(0),
    "freed in part": lambda: with_freed_memory(479),
    "marked": marked,
    "fake": fake,
    "sparse": lambda: torch.zeros(SHAPE).to_sparse(),
    "subclass": lambda: torch.zeros(SHAPE).as_subclass(Subclass),
    "nested": lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
}


def items(count: int, shape: tuple[int, ...] = SHAPE, stride: tuple[int, ...] | None = None) -> Items:
    return Items.of(
        Item("tensor", 0, i * 600, 600, i * 600, 480, "float32", shape, stride or contiguous_stride(shape))
        for i in range(count)
    )


@pytest.mark.parametrize("name", DIRECT)
def test_tensor_that_takes_the_bytes_is_found(name: str) -> None:
    assert DirectTargets(items(1)).among([0], [DIRECT[name]()]) == [True]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("name", OTHERS)
def test_tensor_that_does_not_is_left_to_the_slower_checks(name: str) -> None:
    assert DirectTargets(items(1)).among([0], [OTHERS[name]()]) == [False]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("seed", range(5))
def test_among_many_each_is_answered_as_alone(seed: int) -> None:
    rng = random.Random(seed)
    names = [rng.choice([*DIRECT] * 8 + [*OTHERS]) for _ in range(200)]
    made = [(DIRECT | OTHERS)[name]() for name in names]
    assert DirectTargets(items(200)).among(range(200), made) == [name in DIRECT for name in names]


def test_values_that_are_no_tensors_and_nodes_that_are_no_items_are_not_direct() -> None:
    values = [torch.zeros(SHAPE), 5, torch.zeros(SHAPE), None, torch.zeros(SHAPE)]
    nodes = [0, 1, ["tensor", 2, {"parameter": True}], 3, 4]
    assert DirectTargets(items(5)).among(nodes, values) == [True, False, False, False, True]
    assert DirectTargets(items(1)).among([], []) == []


def test_tensor_of_a_running_transform_is_not_direct() -> None:
    def look(tensor: torch.Tensor) -> torch.Tensor:
        answers.append(DirectTargets(items(1, (4,))).among([0, 0], [tensor, torch.zeros(4)]))
        return tensor

    answers: list[list[bool]] = []
    torch.func.vmap(look)(torch.zeros(3, 4))
    assert answers == [[False, True]]


def test_items_of_another_order_or_kind_are_not_direct() -> None:
    channels_last = torch.zeros(SHAPE).to(memory_format=torch.channels_last).stride()
    assert DirectTargets(items(1, SHAPE, channels_last)).among([0], [torch.zeros(SHAPE)]) == [False]
    odd = [Item("object", 0, 0, 9, 0, 9, "", (), ()), Item("tensor", 0, 9, 9, 9, 9, "of another torch", (9,), (1,))]
    assert DirectTargets(Items.of(odd)).among([0, 1], [torch.zeros(()), torch.zeros(9)]) == [False, False]


def many(count: int = 600) -> dict[str, torch.Tensor]:
    """Small tensors of some shapes, in a mixture."""
    rng, generator = random.Random(1), torch.Generator().manual_seed(1)
    shapes = [(256,), (16, 16), (), (0,), (3,), (1, 7), (5000,)]
    return {f"t{i}": torch.randn(rng.choice(shapes), generator=generator) for i in range(count)}


def test_each_of_many_tensors_gets_its_bytes_and_a_new_version(run_dir: Path) -> None:
    state = many()
    into = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    kept = dict(into)
    restore(run_dir, {"model": state}, {"model": into})
    assert all(into[name] is kept[name] and bits(into[name]) == bits(state[name]) for name in state)
    assert {tensor._version for tensor in into.values()} == {1}


@pytest.mark.parametrize("container", [dict, OrderedDict])
def test_those_that_take_no_bytes_are_copied_among_those_that_do(run_dir: Path, container: Any) -> None:
    state = {f"t{i}": torch.randn(SHAPE) for i in range(300)}
    into = container((name, torch.zeros(SHAPE)) for name in state)
    for number, made in enumerate(("channels last", "transposed", "negative", "of inference", "parameter")):
        into[f"t{50 * number + 7}"] = (OTHERS | DIRECT)[made]()
    into["t0"] = torch.zeros(2 * 120)[::2].view(SHAPE)
    kept = dict(into)
    restore(run_dir, {"model": state}, {"model": into})
    assert all(into[name] is kept[name] and bits(into[name].detach()) == bits(state[name]) for name in state)


def test_tied_and_overlapping_targets_among_many(run_dir: Path) -> None:
    state = many(100) | {"a": torch.arange(10.0), "b": torch.arange(10.0)[4:], "c": torch.arange(10.0)}
    into = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    into["b"] = into["a"][4:]
    into["c"] = into["a"]
    restore(run_dir, {"model": state}, {"model": into})
    assert all(bits(into[name]) == bits(state[name]) for name in state)
    state["b"] = state["b"] + 1
    with pytest.raises(StateMismatchError, match=r"model\['b'\] and model\['c'\]: share memory in the target"):
        restore(run_dir, {"model": state}, {"model": into}, step=2)


def test_tied_tensors_of_the_checkpoint_go_to_each_of_their_targets(run_dir: Path) -> None:
    tied = torch.randn(8)
    into = {"a": torch.zeros(16)[::2], "b": torch.zeros(8), "c": torch.zeros(8)}
    restore(run_dir, {"m": {"a": tied, "b": tied, "c": tied}}, {"m": into})
    assert all(bits(tensor) == bits(tied) for tensor in into.values())


def test_of_many_tensors_those_that_do_not_fit_are_named_in_order_and_nothing_is_changed(run_dir: Path) -> None:
    state = {f"t{i}": torch.randn(4) for i in range(3000)}
    into: dict[str, Any] = {name: torch.zeros(4) for name in state}
    into["t2999"] = torch.zeros(4, device="meta")
    into["t1500"] = torch.zeros(4, dtype=torch.int64)
    into["t2"] = torch.zeros(5)
    before = contents(into)
    with pytest.raises(StateMismatchError) as raised:
        restore(run_dir, {"model": state}, {"model": into})
    lines = str(raised.value).split("\n")
    assert [line.split(":")[0].strip() for line in lines[1:4]] == ["model['t2']", "model['t1500']", "model['t2999']"]
    assert "has shape [5] in the target and [4] in the checkpoint" in lines[1]
    assert "is int64 in the target and float32 in the checkpoint" in lines[2]
    assert "is on the meta device" in lines[3]
    assert contents(into) == before


@pytest.mark.parametrize("number", [0, 299, 599])
def test_damaged_byte_in_a_group_names_its_key(run_dir: Path, number: int) -> None:
    state = {f"t{i}": torch.randn(64) for i in range(600)}
    info = save(run_dir, state)
    data = next(Path(info.path).glob("*.distcp"))
    whole = data.read_bytes()
    at = whole.index(state[f"t{number}"].numpy().tobytes())
    data.write_bytes(whole[: at + 3] + bytes([whole[at + 3] ^ 1]) + whole[at + 4 :])
    with pytest.raises(CorruptCheckpointError, match=rf"are damaged \(t{number}\): their xxh3 hash does not match"):
        restorer(info).load_into({name: torch.zeros(64) for name in state}, True)


def test_short_file_is_told_before_anything_is_changed(run_dir: Path) -> None:
    state = {f"t{i}": torch.randn(64) for i in range(600)}
    info = save(run_dir, state)
    data = next(Path(info.path).glob("*.distcp"))
    size = data.stat().st_size
    data.write_bytes(data.read_bytes()[:-1])
    into = {name: torch.zeros(64) for name in state}
    with pytest.raises(CorruptCheckpointError, match=f"is {size - 1} bytes long, should be {size}"):
        restorer(info).load_into(into, True)
    assert all(tensor._version == 0 for tensor in into.values())
