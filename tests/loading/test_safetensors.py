"""Files of safetensors that stand alone: those of its own library, stager's, and hostile ones."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from stager import CorruptCheckpointError, StateMismatchError, UsageError, export_checkpoint, load_checkpoint
from tests.cli.conftest import Outcome
from tests.persistence.tasks import save
from tests.states import same

STATE = {
    "w": torch.randn(5, 3),
    "layers.0.h": torch.randn(7).bfloat16(),
    "scalar": torch.tensor(3),
    "empty": torch.empty(0, 4),
    "mask": torch.tensor([True, False, True]),
    "f8": torch.randn(9).to(torch.float8_e4m3fn),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    safetensors.torch.save_file(STATE, tmp_path / "a.safetensors", {"format": "pt", "author": "w of somewhere"})
    return tmp_path / "a.safetensors"


def test_is_read_as_its_own_library_reads_it(path: Path, tmp_path: Path) -> None:
    assert same(load_checkpoint(path).state, safetensors.torch.load_file(path))
    path.rename(tmp_path / "weights")  # by what is in it, not by its name
    assert same(load_checkpoint(tmp_path / "weights").state, safetensors.torch.load_file(tmp_path / "weights"))
    safetensors.torch.save_file({}, path)
    assert load_checkpoint(path).state == {}


def test_into_what_is_there(path: Path) -> None:
    into = {name: torch.zeros_like(tensor) for name, tensor in STATE.items()}
    w = into["w"]
    assert load_checkpoint(path, into).state is into
    assert into["w"] is w and same(into, STATE)
    with pytest.raises(StateMismatchError, match=r"w: has shape \[2\] in the target and \[5, 3\] in the checkpoint"):
        load_checkpoint(path, {"w": torch.zeros(2)})


def test_tied_weights_of_an_export_are_one_tensor(run_dir: Path, tmp_path: Path) -> None:
    weight = torch.randn(3, 3)
    export_checkpoint(save(run_dir, {"a": weight, "b": weight}).path, tmp_path / "a.st", file_format="safetensors")
    loaded = load_checkpoint(tmp_path / "a.st").state
    assert loaded["a"] is loaded["b"] and torch.equal(loaded["a"], weight)


def test_inspect(path: Path) -> None:
    answer = Outcome("inspect", path, "--json", "--keys", "layers.*").json
    assert (answer["format"], answer["num_tensors"], answer["nbytes"]) == ("safetensors", 6, path.stat().st_size)
    (tensor,) = answer["tensors"]
    assert (tensor["key"], tensor["dtype"], tensor["shape"], tensor["nbytes"]) == ("layers.0.h", "bfloat16", [7], 14)
    with open(path, "rb") as file:
        file.seek(tensor["offset"])
        assert file.read(14) == bytes(STATE["layers.0.h"].view(torch.uint8).tolist())


def of(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(low: Any, high: Any, shape: Any, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [low, high]}


HOSTILE = {
    "no object": of(b"{]"),
    "too long": of({"a": entry(0, 8, [2])}, bytes(9)),
    "too short": of({"a": entry(0, 8, [2])}, bytes(7)),
    "huge": of({"a": entry(0, 1 << 62, [1 << 60])}, bytes(8)),
    "gap": of({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, bytes(12)),
    "overlap": of({"a": entry(0, 8, [2]), "b": entry(4, 8, [1])}, bytes(8)),
    "shape": of({"a": entry(0, 8, [3])}, bytes(8)),
    "negative": of({"a": entry(0, 8, [-1, -2])}, bytes(8)),
    "backwards": of({"a": entry(8, 0, [2])}, bytes(8)),
    "text": of({"a": entry("0", "8", [2])}, bytes(8)),
    "float": of({"a": entry(0, 8.0, [2])}, bytes(8)),
    "true": of({"a": entry(0, 4, [True])}, bytes(4)),
    "no entry": of({"a": 5}),
    "twice": of(
        b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
    ),
    "metadata": of({"__metadata__": 5, "a": entry(0, 4, [1])}, bytes(4)),
    "deep": of(b'{"a":' + b"[" * 200_000),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_header_that_lies_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "a").write_bytes(HOSTILE[name])
    with pytest.raises(CorruptCheckpointError, match=r"its safetensors header is not valid|or its header is damaged"):
        load_checkpoint(tmp_path / "a")
    assert Outcome("inspect", tmp_path / "a").code == 1


def test_unknown_dtype_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(of({"a": entry(0, 1, [2], "F4")}, bytes(1)))
    with pytest.raises(UsageError, match="a has the dtype F4"):
        load_checkpoint(tmp_path / "a")


def test_every_cut_of_a_file_is_an_error(path: Path) -> None:
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(CorruptCheckpointError):
            load_checkpoint(path)
    path.write_bytes(whole[:-1])
    with pytest.raises(
        CorruptCheckpointError, match=rf"need {len(whole)} bytes, and it has only {len(whole) - 1}: it is cut"
    ):
        load_checkpoint(path)
