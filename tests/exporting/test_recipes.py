"""Containers with classes and keys of their own, and tensors made of others, in an exported file and in the commands."""

from __future__ import annotations

import enum
from collections import Counter, OrderedDict, UserDict, defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.testing._internal.two_tensor import TwoTensor

from stager import Checkpointer, StagerStorageReader, export_checkpoint, load_checkpoint
from stager.workers.errors import MemoryBudgetError, UnsafePickleError
from tests.cli.conftest import Outcome
from tests.persistence.tasks import save


class Mode(enum.Enum):
    TRAIN = 1
    EVAL = 2


class Registry(dict[str, Any]):
    """A dict with a class and an attribute of its own."""


class Stack(list[Any]):
    """A list with a class of its own."""


def registry(**entries: Any) -> Registry:
    made = Registry(**entries)
    vars(made)["version"] = 3
    return made


def state() -> dict[str, Any]:
    shared = torch.arange(6.0)
    return {
        "pairs": {
            (0, 0): torch.ones(2),
            (0, 1): {"deep": torch.zeros(3)},
            b"raw": 5,
            Mode.EVAL: registry(x=torch.ones(1)),
        },
        "registry": registry(weight=shared, again=shared, column=torch.arange(6.0).reshape(2, 3).t(), n=1),
        "stack": Stack([torch.ones(2), {"y": torch.zeros(1)}, "text"]),
        "user": UserDict(a=torch.ones(3)),
        "default": defaultdict(list, a=[torch.ones(2)]),
        "two": TwoTensor(torch.ones(2, 2), torch.zeros(2, 2)),
        "plain": OrderedDict(w=torch.full((2,), 7.0)),
        "counts": Counter("abracadabra"),
        "one": 1,
    }


def assert_equal(found: Any, wanted: Any, place: str = "state") -> None:
    """Equal in class, keys and values, all the way down."""
    assert type(found) is type(wanted), place
    if isinstance(wanted, TwoTensor):
        assert_equal([found.a, found.b], [wanted.a, wanted.b], place)
    elif isinstance(wanted, torch.Tensor):
        assert torch.equal(found, wanted) and found.stride() == wanted.stride(), place
    elif isinstance(wanted, (dict, UserDict)):
        assert list(found) == list(wanted) and getattr(found, "version", None) == getattr(wanted, "version", None), (
            place
        )
        for key in wanted:
            assert_equal(found[key], wanted[key], f"{place}[{key!r}]")
    elif isinstance(wanted, list):
        assert len(found) == len(wanted), place
        for number, value in enumerate(wanted):
            assert_equal(found[number], value, f"{place}[{number}]")
    else:
        assert found == wanted, place


@pytest.mark.parametrize("kind", ["dcp", "safetensors", "torch"])
def test_a_pt_file_gives_back_every_container(run_dir: Path, tmp_path: Path, kind: str) -> None:
    path = save(run_dir, state(), kind=kind, num_parts=2, num_files=2).path
    export_checkpoint(path, tmp_path / "out.pt", allow_pickle=True, max_memory_bytes=1 << 20)
    loaded = torch.load(tmp_path / "out.pt", weights_only=False)
    wanted = state()
    assert_equal(loaded, wanted)
    assert loaded["registry"]["weight"].data_ptr() == loaded["registry"]["again"].data_ptr()
    assert_equal(load_checkpoint(tmp_path / "out.pt", allow_pickle=True).state, wanted)


def test_a_state_that_is_itself_a_container_with_a_recipe(run_dir: Path, tmp_path: Path) -> None:
    for number, whole in enumerate((registry(**state()), {(1, 2): torch.ones(2), 3: {"x": 4}})):
        path = save(run_dir, whole, step=number).path
        export_checkpoint(path, tmp_path / f"{number}.pt", allow_pickle=True)
        assert_equal(torch.load(tmp_path / f"{number}.pt", weights_only=False), whole)


def test_plain_keys_need_no_permission_and_no_memory(run_dir: Path, tmp_path: Path) -> None:
    """A dict with tuples as keys is a dict in the file, too: its tensors are streamed."""
    large = {(0, number): torch.full((1 << 18,), float(number)) for number in range(4)}
    path = save(run_dir, {"pairs": large}).path
    export_checkpoint(path, tmp_path / "out.pt", max_memory_bytes=1 << 20)
    assert_equal(torch.load(tmp_path / "out.pt", weights_only=True), {"pairs": large})
    path = save(run_dir, {"pairs": registry(w=torch.ones(1 << 20))}, step=2).path
    with pytest.raises(UnsafePickleError, match=r"pairs\['__recipe__'\]"):
        export_checkpoint(path, tmp_path / "own.pt")
    with pytest.raises(MemoryBudgetError, match=r"^pairs: "):
        export_checkpoint(path, tmp_path / "own.pt", allow_pickle=True, max_memory_bytes=1 << 20)


@pytest.mark.parametrize("kind", ["dcp", "safetensors"])
def test_a_safetensors_file_has_every_tensor_by_its_name(run_dir: Path, tmp_path: Path, kind: str) -> None:
    path = save(run_dir, state(), kind=kind).path
    result = export_checkpoint(path, tmp_path / "out.safetensors", file_format="safetensors")
    loaded = load_file(tmp_path / "out.safetensors")
    names = {"pairs.(0, 0)", "pairs.(0, 1).deep", "pairs.Mode.EVAL.x", "registry.weight", "registry.column"}
    names |= {"stack.0", "stack.1.y", "two.a", "two.b", "plain.w"}
    assert names <= set(loaded)
    assert torch.equal(loaded["two.b"], torch.zeros(2, 2))
    assert torch.equal(loaded["registry.column"], state()["registry"]["column"])
    assert {"pairs", "registry", "stack", "two", "one"} <= set(result.left_out)
    assert not [name for name in result.left_out if "recipe" in name]


def test_load_takes_such_containers_whole_or_by_keys(run_dir: Path) -> None:
    path = save(run_dir, state()).path
    assert_equal(load_checkpoint(path, allow_pickle=True).state, state())
    with Checkpointer(run_dir, read_only=True) as ckpt:
        for keys in ("pairs.*", "registry.weight", "stack.0", "two.a"):
            loaded = ckpt.load(keys=keys, allow_pickle=True)
            name = keys.partition(".")[0]
            assert loaded is not None
            assert_equal(loaded.state, {name: state()[name]})


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_dcp_load_finds_the_tensors_in_them(run_dir: Path) -> None:
    path = save(run_dir, state()).path
    into: dict[str, dict[str, torch.Tensor]]
    into = {"registry": {"weight": torch.zeros(6)}, "two": {"a": torch.zeros(2, 2)}, "plain": {"w": torch.zeros(2)}}
    for reader in (StagerStorageReader(path), dcp.FileSystemReader(path)):
        dcp.load(into, storage_reader=reader)
        assert torch.equal(into["registry"]["weight"], torch.arange(6.0))
        assert torch.equal(into["two"]["a"], torch.ones(2, 2))


def test_the_commands_read_them(run_dir: Path) -> None:
    path = save(run_dir, state()).path
    outcome = Outcome("inspect", path, "--json")
    assert outcome.code == 0 and "two" in outcome.out and "(0, 1)" in outcome.out
    for command in (("verify", path), ("ls", run_dir), ("plan", path), ("inspect", path)):
        outcome = Outcome(*command)
        assert outcome.code == 0, (command, outcome.err)
