"""Files of torch.save that are no zip archives, as torch wrote them before 1.6."""

from __future__ import annotations

import os
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from stager import CorruptCheckpointError, StateMismatchError, UnsafePickleError, load_checkpoint
from tests.cli.conftest import Outcome
from tests.states import same

pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")


def legacy(value: Any, path: Path, **options: Any) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=False, **options)
    return path


def model_state() -> dict[str, Any]:
    base = torch.arange(12.0).view(3, 4)
    return {
        "model": torch.nn.Linear(4, 3).state_dict(),
        "views": [base, base.t(), base[1:, 2:]],
        "types": {kind: torch.ones(2).to(kind) for kind in (torch.bfloat16, torch.int8, torch.complex64, torch.bool)},
        "empty": torch.empty(0, 3),
        "n": {"epoch": 3, "betas": (0.9, 0.99)},
    }


def test_is_read_as_torch_load_reads_it(tmp_path: Path) -> None:
    path = legacy(model_state(), tmp_path / "b.pt")
    loaded = load_checkpoint(path)
    assert same(loaded.state, torch.load(path, weights_only=True))
    assert loaded.step is loaded.info is None
    base, turned, part = loaded.state["views"]
    assert base.untyped_storage().data_ptr() == turned.untyped_storage().data_ptr() == part.untyped_storage().data_ptr()
    assert load_checkpoint(legacy(7, tmp_path / "c.pt")).state == 7


def test_into_what_is_there(tmp_path: Path) -> None:
    state = model_state()
    path = legacy(state, tmp_path / "a.pt")
    model = torch.nn.Linear(4, 3)
    weight = model.weight
    into = {"model": model, "n": {"epoch": 0}}
    load_checkpoint(path, into)
    assert model.weight is weight and same(dict(model.state_dict()), dict(state["model"])) and into["n"] == state["n"]
    with pytest.raises(StateMismatchError, match=r"views\[0\]: has shape"):
        load_checkpoint(path, {"model": torch.nn.Linear(4, 3), "views": [torch.zeros(2)]})
    assert list(load_checkpoint(path, keys="n").state) == ["n"]


def test_inspect(tmp_path: Path) -> None:
    answer = Outcome("inspect", legacy({"a": {"b": torch.ones(2, 3)}, "n": 1}, tmp_path / "a.pt"), "--json").json
    assert (answer["format"], answer["num_tensors"], answer["num_objects"]) == ("torch.save", 1, 1)
    (tensor,) = answer["tensors"]
    assert (tensor["key"], tensor["dtype"], tensor["shape"]) == ("a.b", "float32", [2, 3])


class RunsCode:
    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
def test_code_runs_only_when_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    legacy({"x": RunsCode()}, tmp_path / "a.pt")
    with pytest.raises(UnsafePickleError, match=r"posix\.mkdir.*allow_pickle"):
        load_checkpoint("a.pt")
    assert not os.path.exists("ran")
    load_checkpoint("a.pt", allow_pickle=True)
    assert os.path.exists("ran")
    module = legacy(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(UnsafePickleError, match=r"its class torch\.nn\.modules\.linear\.Linear is not allowed"):
        load_checkpoint(module)
    assert type(load_checkpoint(module, allow_pickle=True).state) is torch.nn.Linear
    newer = legacy({"w": torch.ones(1)}, tmp_path / "newer.pt", pickle_protocol=4)
    with pytest.raises(UnsafePickleError, match="protocol newer than 2"):
        load_checkpoint(newer)
    assert same(load_checkpoint(newer, allow_pickle=True).state, {"w": torch.ones(1)})


def test_every_cut_is_an_error(tmp_path: Path) -> None:
    whole = legacy(model_state(), tmp_path / "a.pt").read_bytes()
    for length in [*range(3, 40), *range(40, len(whole), 61), len(whole) - 1]:
        (tmp_path / "a.pt").write_bytes(whole[:length])
        with pytest.raises(CorruptCheckpointError, match=r"a\.pt: is cut short, or damaged"):
            load_checkpoint(tmp_path / "a.pt")
    assert Outcome("inspect", tmp_path / "a.pt").code == 1


def with_counts(data: bytes, count: int) -> bytes:
    """The pickle says that the storage of 1000 elements has ``count``."""
    said = pickle.dumps(1000, protocol=2)[2:-1]
    assert data.count(said) >= 1
    return data.replace(said, b"\x8a\x08" + struct.pack("<q", count))


@pytest.mark.parametrize("count", [1 << 40, 1 << 61, -1, 1001])
def test_a_storage_that_is_longer_than_the_file_is_refused_before_memory_is_taken(tmp_path: Path, count: int) -> None:
    path = legacy({"w": torch.ones(1000)}, tmp_path / "a.pt")
    path.write_bytes(with_counts(path.read_bytes(), count))
    with pytest.raises(
        CorruptCheckpointError, match=r"a\.pt: is cut short, or damaged: (the pickle claims that storage|its tensors)"
    ):
        load_checkpoint(path)


def test_storages_that_are_longer_than_the_file_together_are_refused(tmp_path: Path) -> None:
    path = legacy([torch.ones(1000, dtype=torch.uint8) for _ in range(30)], tmp_path / "a.pt")
    path.write_bytes(with_counts(path.read_bytes(), 20_000))
    with pytest.raises(CorruptCheckpointError, match="its tensors take 600240 bytes"):
        load_checkpoint(path)
