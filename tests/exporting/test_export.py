"""One file out of any checkpoint: what is in it, how much memory it takes, and what never happens."""

from __future__ import annotations

import errno
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from stager import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    PathCheckpointer,
    StorageError,
    UnsafePickleError,
    UnstageableError,
    UsageError,
    export_checkpoint,
    export_weights,
)
from stager.exporting.output import runs_of
from stager.workers.checkpoint.formats import FORMATS
from stager.workers.checkpoint.storage.posix import files
from stager.workers.errors import MemoryBudgetError
from tests.cli.conftest import Outcome, flip_bit
from tests.exporting.sharded import chunked_checkpoint
from tests.faults import Faults
from tests.persistence.tasks import save
from tests.states import everything, same

pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")  # torch.load of quantized tensors


class Custom:
    """Not what ``weights_only`` knows."""

    def __init__(self) -> None:
        self.value = 1


@pytest.mark.parametrize("kind", FORMATS)
def test_any_checkpoint_becomes_one_pt_file(run_dir: Path, tmp_path: Path, kind: str) -> None:
    state = everything()
    info = save(run_dir, state, kind=kind, num_parts=3, num_files=3, segment_bytes=300)
    out = tmp_path / "out.pt"
    result = export_checkpoint(info.path, out, max_memory_bytes=1 << 20)
    for mmap in (True, False):
        loaded = torch.load(out, weights_only=True, mmap=mmap)
        assert same(loaded, state)
    assert loaded["tied"]["a"].data_ptr() == loaded["tied"]["b"].data_ptr()
    assert (result.nbytes, result.left_out, result.step) == (out.stat().st_size, (), 1)
    assert result.num_tensors + result.num_objects > 20


@pytest.mark.parametrize("kind", FORMATS)
def test_any_checkpoint_becomes_one_safetensors_file(run_dir: Path, tmp_path: Path, kind: str) -> None:
    weight = torch.randn(4, 6)
    state = {
        "m": {"w": weight, "tied": weight, "t": weight.t(), "h": torch.ones(3).bfloat16(), "none": torch.ones(2, 0)},
        "list": [torch.tensor(7), torch.tensor(True)],
        "n": 3,
    }
    info = save(run_dir, state, kind=kind, num_parts=3, num_files=2, segment_bytes=100)
    out = tmp_path / "out.safetensors"
    result = export_checkpoint(info.path, out, file_format="safetensors", max_memory_bytes=1 << 20)
    loaded = load_file(out)
    expected = {f"m.{name}": value for name, value in state["m"].items() if name != "tied"}
    expected |= {f"list.{number}": value for number, value in enumerate(state["list"])}
    assert set(loaded) == set(expected) and all(same(loaded[name], expected[name]) for name in expected)
    with safe_open(out, "pt") as opened:
        assert opened.metadata() == {"m.tied": "m.w", "format": "pt"}
    assert result.left_out == ("n",)


def test_two_keys_that_join_to_one_name_are_two_tensors(run_dir: Path, tmp_path: Path) -> None:
    info = save(run_dir, {"a.w": torch.ones(2), "a": {"w": torch.zeros(3)}})
    export_checkpoint(info.path, tmp_path / "a.safetensors")
    loaded = load_file(tmp_path / "a.safetensors")
    assert sorted(tensor.tolist() for tensor in loaded.values()) == [[0, 0, 0], [1, 1]]


@pytest.mark.parametrize("state", [{}, {"n": 1}, {"e": torch.empty(0)}], ids=str)
def test_states_with_next_to_nothing_in_them(run_dir: Path, tmp_path: Path, state: dict[str, Any]) -> None:
    info = save(run_dir, state)
    export_checkpoint(info.path, tmp_path / "a.pt")
    assert same(torch.load(tmp_path / "a.pt", weights_only=True), state)
    export_checkpoint(info.path, tmp_path / "a.safetensors", file_format="safetensors")
    assert set(load_file(tmp_path / "a.safetensors")) == set(state) - {"n"}


@pytest.mark.parametrize("file_format", ["torch", "safetensors"])
def test_tensors_in_chunks_become_whole(tmp_path: Path, file_format: str) -> None:
    path, whole = chunked_checkpoint(tmp_path)
    out = tmp_path / "out"
    export_checkpoint(path, out, file_format=file_format, max_memory_bytes=1 << 20)
    loaded = torch.load(out, weights_only=True) if file_format == "torch" else load_file(out)
    assert same({name: loaded[name] for name in whole}, whole)


def test_runs_are_where_the_elements_are() -> None:
    """Every part of a small tensor, against torch's own slicing."""
    whole = torch.arange(2 * 3 * 4, dtype=torch.int16).reshape(2, 3, 4)
    for low in itertools.product(range(2), range(3), range(4)):
        for high in itertools.product(*(range(a + 1, n + 1) for a, n in zip(low, whole.shape, strict=True))):
            part = whole[tuple(map(slice, low, high))]
            runs = runs_of(tuple(whole.shape), tuple(part.shape), low, 2)
            count = runs.nbytes // 2
            starts = [runs.place(run) // 2 for run in range(part.numel() // count)]
            assert [start + i for start in starts for i in range(count)] == part.flatten().tolist()


CHILD = """
import json, resource, sys
from stager.exporting.export import export_checkpoint
import torch
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
result = export_checkpoint(sys.argv[1], sys.argv[2], file_format=sys.argv[3], max_memory_bytes=int(sys.argv[4]))
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([(after - before) * 1024, result.nbytes]))
"""


@pytest.mark.parametrize("file_format", ["torch", pytest.param("safetensors", marks=pytest.mark.long)])
def test_peak_memory_stays_within_the_budget_of_a_state_eight_times_as_large(
    run_dir: Path, tmp_path: Path, file_format: str
) -> None:
    budget = 16 << 20
    state = {"one": torch.ones(24 << 20, dtype=torch.int32), "rest": [torch.ones(4 << 20) for _ in range(2)]}
    info = save(run_dir, state, fsync=False)
    command = [sys.executable, "-c", CHILD, info.path, str(tmp_path / "out"), file_format, str(budget)]
    grown, nbytes = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert nbytes >= 8 * budget
    assert grown <= budget


def test_damaged_source_leaves_no_file(run_dir: Path, tmp_path: Path) -> None:
    info = save(run_dir, {"x": torch.arange(90_000), "y": torch.ones(3)}, num_parts=1, segment_bytes=100_000)
    flip_bit(Path(info.path) / "__0_0.distcp", 500_000)
    with pytest.raises(CorruptCheckpointError, match=r"__0_0\.distcp: the bytes from 500000 on are damaged"):
        export_checkpoint(info.path, tmp_path / "out.pt")
    assert os.listdir(tmp_path) == ["run"]


def test_code_of_the_checkpoint_runs_only_when_allowed(run_dir: Path, tmp_path: Path) -> None:
    info = save(run_dir, {"x": torch.ones(3), "o": Custom()})
    with pytest.raises(UnsafePickleError, match=r"^o in .*allow_pickle"):
        export_checkpoint(info.path, tmp_path / "out.pt")
    assert os.listdir(tmp_path) == ["run"]
    export_checkpoint(info.path, tmp_path / "out.pt", allow_pickle=True)
    assert torch.load(tmp_path / "out.pt", weights_only=False)["o"].value == 1
    export_checkpoint(info.path, tmp_path / "out.safetensors", file_format="safetensors")  # unpickles nothing


def test_what_does_not_fit_is_refused_by_name(run_dir: Path, tmp_path: Path) -> None:
    wide = torch.ones(1000, 1000).t()
    info = save(run_dir, {"a": {"wide": wide}, "c": torch.ones(2, dtype=torch.complex128), "text": "x" * (1 << 20)})
    with pytest.raises(UnstageableError, match=r"^c: has dtype complex128"):
        export_checkpoint(info.path, tmp_path / "out", file_format="safetensors")
    with pytest.raises(MemoryBudgetError, match=r"^text: "):
        export_checkpoint(info.path, tmp_path / "out.pt", max_memory_bytes=2 << 20)
    info = save(run_dir, {"a": {"wide": wide}}, step=2)
    with pytest.raises(MemoryBudgetError, match=r"^a\['wide'\]: .*max_memory"):
        export_checkpoint(info.path, tmp_path / "out", file_format="safetensors", max_memory_bytes=8 << 20)
    export_checkpoint(info.path, tmp_path / "out.pt", max_memory_bytes=1 << 20)  # torch keeps strides
    with pytest.raises(UsageError, match="at least"):
        export_checkpoint(info.path, tmp_path / "other.pt", max_memory_bytes=1000)
    assert sorted(os.listdir(tmp_path)) == ["out.pt", "run"]


def test_nothing_is_overwritten_without_force(run_dir: Path, tmp_path: Path) -> None:
    info = save(run_dir)
    out = tmp_path / "out.pt"
    out.write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        export_checkpoint(info.path, out)
    assert out.read_text() == "mine"
    export_checkpoint(info.path, out, force=True)
    assert torch.load(out, weights_only=True)["b"]["n"] == 3
    with pytest.raises(UsageError, match="is a directory"):
        export_checkpoint(info.path, run_dir, force=True)
    assert sorted(os.listdir(tmp_path)) == ["out.pt", "run"]


def test_file_that_came_meanwhile_is_not_overwritten(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = save(run_dir)
    out = tmp_path / "out.pt"
    write_all = files.write_all
    monkeypatch.setattr(files, "write_all", lambda *a: (write_all(*a), out.write_text("mine")))
    with pytest.raises(UsageError, match="exists already"):
        export_checkpoint(info.path, out)
    assert out.read_text() == "mine" and sorted(os.listdir(tmp_path)) == ["out.pt", "run"]


@pytest.mark.parametrize("call", ["fsync", "link", "pwritev", "ftruncate"])
def test_storage_error_leaves_no_file(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    info = save(run_dir)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(StorageError) as caught:
            export_checkpoint(info.path, tmp_path / "out.pt")
    assert caught.value.errno == errno.ENOSPC and os.listdir(tmp_path) == ["run"]


def test_command(saved_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.pt"
    answer = Outcome("export", saved_run, out, "--step", "20", "--json").json
    assert (answer["step"], answer["format"], answer["nbytes"]) == (20, "torch", out.stat().st_size)
    assert torch.load(out, weights_only=True)["data"]["order"][1] == 7
    again = Outcome("export", saved_run, out)
    assert again.code == 2 and "--force" in again.err
    assert Outcome("export", saved_run, out, "--force").code == 0
    other = Outcome("export", saved_run, tmp_path / "a.safetensors", "--max-memory", "4MiB")
    assert other.code == 0 and "left out" in other.out and "data['order'][1]" in other.out
    assert "model.weight" in load_file(tmp_path / "a.safetensors")
    assert Outcome("export", tmp_path / "nowhere", tmp_path / "b.pt").code == 1
    assert Outcome("export", saved_run, tmp_path / "b.pt", "--max-memory", "much").code == 2
    assert Outcome("export", saved_run, tmp_path / "b", "--format", "zip").code == 2
    contradiction = Outcome("export", saved_run, tmp_path / "b.pt", "--format", "safetensors")
    assert contradiction.code == 2 and "--format" in contradiction.err
    only = "--keys", "model", "--strip-prefix", "model."
    assert Outcome("export", saved_run, tmp_path / "b.safetensors", *only).code == 0
    assert set(load_file(tmp_path / "b.safetensors")) == {"weight", "scale"}


def test_command_says_no_to_a_damaged_checkpoint(run: Path, tmp_path: Path) -> None:
    flip_bit(run / "step-00000300" / "__0_0.distcp", 5000)
    outcome = Outcome("export", run, tmp_path / "a.pt")
    assert outcome.code == 1 and "__0_0.distcp" in outcome.err and not (tmp_path / "a.pt").exists()


@pytest.mark.parametrize(
    ("export", "out"), [(export_checkpoint, "out.pt"), (export_checkpoint, "out.safetensors"), (export_weights, "out")]
)
def test_checkpoint_that_is_replaced_when_its_export_begins_is_not_called_damaged(
    tmp_path: Path, faults: Faults, export: Callable[..., Any], out: str
) -> None:
    """1. The manifest was read. 2. A later save takes the path. 3. The files have the names and sizes of the former ones."""
    runs, config = tmp_path / "runs", {"workers": {"count": 1}, "persistence": {"fsync": False}}
    with PathCheckpointer(config) as ckpt, ThreadPoolExecutor(1) as executor:
        ckpt.save(runs / "last.ckpt", {"x": torch.ones(500)}, step=1, files={"a.txt": b"1"}).upload_completion.result()
        with faults.hold("export.manifest") as held:
            exported = executor.submit(export, runs / "last.ckpt", tmp_path / out)
            held.wait()
            again = ckpt.save(runs / "last.ckpt", {"x": torch.zeros(500)}, step=2, files={"a.txt": b"2"})
            again.upload_completion.result()
        with pytest.raises(CheckpointNotFoundError, match=r"last\.ckpt: was replaced or removed when its export began"):
            exported.result()
        assert export(runs / "last.ckpt", tmp_path / out).step == 2
        assert sorted(os.listdir(tmp_path)) == ["faults", out, "runs"]
