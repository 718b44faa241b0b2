"""What is no checkpoint is named, with what to do: directories of all kinds, and files of other formats."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import re
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageWriter

from stager import (
    Checkpointer,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    StagerError,
    UsageError,
    load_checkpoint,
)
from tests.cli.conftest import Outcome
from tests.persistence.tasks import save
from tests.states import same

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def refusal(path: Path, kind: type[StagerError] = CheckpointNotFoundError) -> str:
    """The message, which names the path; the same whatever is asked for."""
    with pytest.raises(kind) as raised:
        load_checkpoint(path)
    assert type(raised.value) is kind and str(path) in str(raised.value)
    with pytest.raises(kind) as again:
        load_checkpoint(path, {"w": torch.zeros(2)}, keys="w")
    assert str(again.value) == str(raised.value)
    return str(raised.value)


# Directories


@pytest.fixture
def run(run_dir: Path) -> Path:
    for step in (1, 5, 9):
        save(run_dir, {"w": torch.full((2,), float(step))}, step=step)
    return run_dir


def test_directory_of_a_run_is_told_with_its_steps_and_advice_that_works(run: Path) -> None:
    said = refusal(run)
    assert "is the directory of a run, with the checkpoints of steps 9, 5, 1;" in said
    one_step = said.partition("name one of them, ")[2].partition(" for example")[0]
    assert load_checkpoint(one_step).step == 9
    newest = said[said.index("Checkpointer(") :].removesuffix(" loads the newest valid one)")
    assert eval(newest, {"Checkpointer": Checkpointer}).step == 9  # our own text


def test_directory_above_runs_is_told_with_the_runs(run: Path) -> None:
    run.rename(run.parent / "b")
    for name in ("a", "c", "d"):
        shutil.copytree(run.parent / "b", run.parent / name)
    (run.parent / "not a run").mkdir()
    said = refusal(run.parent)
    assert f"contains the runs a, b, c and 1 more: give the directory of one run, such as {run.parent / 'a'}" in said


def test_step_that_is_not_there_is_told_with_those_that_are(run: Path) -> None:
    assert "does not exist; " in (said := refusal(run / "step-00000003")) and "steps 9, 5, 1" in said
    for step in range(10, 20):
        save(run, {"w": torch.ones(2)}, step=step)
    assert "steps 19, 18, 17, 16, 15 and 8 older ones" in refusal(run)
    assert "nor does the directory" in refusal(run / "nowhere" / "step-00000001")


def test_files_of_a_checkpoint_lead_to_its_directory(run: Path) -> None:
    path = run / "step-00000005"
    for name in sorted(os.listdir(path)):
        assert f"is one file of the checkpoint {path}; name that directory" in refusal(path / name)


def test_partial_directory_is_told_with_what_recovers_it(run: Path) -> None:
    partial = run / "step-00000007.partial-abc0"
    partial.mkdir()
    assert f"never committed, or is still being written; `stager recover {run}`" in refusal(partial)
    partial.rmdir()


def test_directory_of_dcp_without_its_metadata(tmp_path: Path) -> None:
    dcp.save({"w": torch.ones(2)}, checkpoint_id=tmp_path / "all" / "step-10", no_dist=True)
    dcp.save({"w": torch.ones(2)}, checkpoint_id=tmp_path / "all" / "step-20", no_dist=True)
    assert "has checkpoints in it: step-10, step-20; name one of them" in refusal(tmp_path / "all")
    (tmp_path / "all" / "step-10" / ".metadata").unlink()
    assert "no .metadata, which is written last: the save did not finish" in refusal(tmp_path / "all" / "step-10")


def test_directories_of_other_things(tmp_path: Path) -> None:
    assert "it is an empty directory" in refusal(tmp_path)
    for name in ("b.txt", "a.txt", "c.txt", "d.txt", "e.txt", "f.txt"):
        (tmp_path / name).touch()
    assert "it has a.txt, b.txt, c.txt, d.txt, e.txt and 1 more" in refusal(tmp_path)
    (tmp_path / "model.pt").touch()
    assert "name one of its files: model.pt" in refusal(tmp_path)


# safetensors in several files


FIRST, SECOND = {"a": torch.ones(2), "b.c": torch.zeros(3)}, {"d": torch.arange(7)}
INDEX = "model.safetensors.index.json"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    path = tmp_path / "shards"
    path.mkdir()
    weight_map = {}
    for number, tensors in enumerate((FIRST, SECOND), 1):
        name = f"model-{number:05d}-of-00002.safetensors"
        safetensors.torch.save_file(tensors, path / name)
        weight_map |= dict.fromkeys(tensors, name)
    (path / "config.json").write_text("{}")
    write_index(path, weight_map)
    return path


def write_index(path: Path, weight_map: Any) -> None:
    (path / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def test_all_files_of_an_index_are_one_checkpoint(shards: Path, tmp_path: Path) -> None:
    for path in (shards, shards / INDEX):
        loaded = load_checkpoint(path)
        assert same(loaded.state, {**FIRST, **SECOND}) and loaded.path == str(path)
    into = {"b": {"c": torch.ones(3)}, "d": torch.zeros(7, dtype=torch.int64)}
    load_checkpoint(shards, into)
    assert same(into, {"b": {"c": FIRST["b.c"]}, "d": SECOND["d"]})
    assert list(load_checkpoint(shards, keys="d").state) == ["d"]
    hub = tmp_path / "hub"  # as the hub's cache has it: a directory of links
    hub.mkdir()
    for name in os.listdir(shards):
        (hub / name).symlink_to(f"../shards/{name}")
    for path in (hub, hub / INDEX):
        assert same(load_checkpoint(path).state, {**FIRST, **SECOND})
    answer = Outcome("inspect", shards, "--json").json
    assert (answer["format"], answer["num_tensors"]) == ("safetensors", 3)
    last = answer["tensors"][-1]
    assert (last["key"], last["file"]) == ("d", "model-00002-of-00002.safetensors")


def test_one_file_needs_no_index_and_several_do(shards: Path) -> None:
    (shards / INDEX).unlink()
    assert "has 2 files of safetensors, and no index of them all: model-00001" in refusal(shards)
    (shards / "model-00002-of-00002.safetensors").unlink()
    assert same(load_checkpoint(shards).state, FIRST)


def test_index_that_lies_is_refused(shards: Path) -> None:
    name = "model-00001-of-00002.safetensors"
    for weight_map, words in (
        ({"a": name, "z": name}, "z is not in model-00001-of-00002.safetensors, where the index says that it is"),
        ({"a": "gone.safetensors"}, "names gone.safetensors, which is missing"),
        ({"a": "../shards/" + name}, "is not the index of safetensors files"),
        ({"a": "/etc/passwd"}, "is not the index of safetensors files"),
        ({"a": 5}, "is not the index of safetensors files"),
        ([], "is not the index of safetensors files"),
        (None, "is not the index of safetensors files"),
    ):
        write_index(shards, weight_map)
        with pytest.raises(CorruptCheckpointError, match=INDEX) as raised:
            load_checkpoint(shards)
        assert words in str(raised.value)
    safetensors.torch.save_file({"a": torch.zeros(1), "d": SECOND["d"]}, shards / "model-00002-of-00002.safetensors")
    write_index(shards, {"b.c": name, "d": "model-00002-of-00002.safetensors"})
    with pytest.raises(CorruptCheckpointError, match="a is in two files"):
        load_checkpoint(shards)


def test_parts_of_ranks_are_not_taken_for_the_whole(tmp_path: Path) -> None:
    writer = HuggingFaceStorageWriter(str(tmp_path / "parts"), save_distributed=True)
    dcp.save({"w": torch.ones(2)}, storage_writer=writer, no_dist=True)
    (file,) = (tmp_path / "parts").iterdir()
    for path in (tmp_path / "parts", file):
        with pytest.raises(UsageError, match=r"HuggingFaceStorageReader, or save with enable_consolidation=True"):
            load_checkpoint(path)
    (tmp_path / "parts" / "shard-00002-model-00001-of-00001.safetensors").write_bytes(file.read_bytes())
    assert "HuggingFaceStorageReader" in refusal(tmp_path / "parts")
    whole = HuggingFaceStorageWriter(str(tmp_path / "whole"))
    dcp.save({"w": torch.ones(2)}, storage_writer=whole, no_dist=True)
    assert same(load_checkpoint(tmp_path / "whole").state, {"w": torch.ones(2)})


# Files


def torchscript(path: Path) -> None:
    class Adds(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.ones(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.w

    torch.jit.save(torch.jit.trace(Adds(), torch.zeros(2)), path)


def exported(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("e/archive_format", "pt2")
        archive.writestr("e/data/weights/weight_0", bytes(8))


def tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            archive.addfile(tarfile.TarInfo(name))


def office(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "x")


def npz(path: Path) -> None:
    with open(path, "wb") as file:
        np.savez(file, a=np.ones(3))


def npy(path: Path) -> None:
    with open(path, "wb") as file:
        np.save(file, np.ones(3))


def of_bytes(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


OTHERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "TorchScript": (torchscript, r"a TorchScript archive.* torch\.jit\.load\(path\)\.state_dict\(\)"),
    "export": (exported, r"an exported program.* torch\.export\.load\(path\)"),
    "tar": (tar, r"a tar archive.* torch\.load\(path, weights_only=False\)"),
    "npz": (npz, r"arrays of NumPy.* numpy\.load"),
    "npy": (npy, r"array of NumPy.* numpy\.load"),
    "HDF5": (of_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100)), "an HDF5 file.* h5py"),
    "pickle": (of_bytes(pickle.dumps({"a": 1})), r"a Python pickle, and torch\.save did not write it"),
    "zip": (office, r"a zip archive that torch\.save did not write \(in it: word/document\.xml\)"),
    "gzip": (of_bytes(gzip.compress(b"x")), "compressed by gzip"),
    "JSON": (of_bytes(b'{"architectures": []}'), "is JSON, and holds no tensors"),
    "LFS": (of_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"), "git lfs pull"),
    "HTML": (of_bytes(b"<!DOCTYPE html><html></html>"), "a web page: the download failed"),
    "GGUF": (of_bytes(b"GGUF" + bytes(100)), "a GGUF file"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
@pytest.mark.parametrize("kind", OTHERS)
def test_file_of_another_kind_is_named(tmp_path: Path, kind: str) -> None:
    make, words = OTHERS[kind]
    make(tmp_path / "a.pt")
    said = refusal(tmp_path / "a.pt", UsageError)
    assert re.search(words, said), said
    assert Outcome("inspect", tmp_path / "a.pt").code == 2


BROKEN = {
    "empty": (b"", "is empty: its writer was stopped"),
    "zeros": (bytes(5000), "begins with zeros only"),
    "text": (b"hello", r"nor anything else that stager knows; it begins with b'hello'"),
    "safetensors": (
        (1000).to_bytes(8, "little") + b'{"a":',
        "its header alone needs 1008 bytes, and the file has only 13",
    ),
    "safetensors, whose length is a brace": (
        b"{" + bytes(7) + b'{"a":',
        "seems to be a safetensors file that is cut short",
    ),
    "archive": (b"PK\3\4" + bytes(100), "whose end is missing or damaged (104 bytes are there"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_file_that_is_broken_is_told_as_what_it_seems_to_be(tmp_path: Path, kind: str) -> None:
    data, words = BROKEN[kind]
    (tmp_path / "a.pt").write_bytes(data)
    assert words in refusal(tmp_path / "a.pt", CorruptCheckpointError)
    assert Outcome("inspect", tmp_path / "a.pt").code == 1


def test_archive_of_torch_save_that_is_cut_short(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1000)}, tmp_path / "a.pt")
    os.truncate(tmp_path / "a.pt", 2000)
    assert "a.pt: is a file of torch.save, or another zip archive, whose end is missing" in refusal(
        tmp_path / "a.pt", CorruptCheckpointError
    )
