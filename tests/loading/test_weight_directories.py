"""Directories of weights as the Hugging Face Hub has them: several files and an index, tied names, and what ranks read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from stager import CorruptCheckpointError, StateMismatchError, load_checkpoint
from tests.staging.ranks import run_ranks

ROWS, COLUMNS = 6, 4


class Tied(nn.Module):
    """A head that shares the weight of the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(ROWS, COLUMNS)
        self.body = nn.Linear(COLUMNS, COLUMNS)
        self.head = nn.Linear(COLUMNS, ROWS, bias=False)
        self.head.weight = self.embedding.weight


def weights() -> dict[str, torch.Tensor]:
    """What a file has of ``Tied``: the embedding, and no head."""
    return {
        "embedding.weight": torch.arange(float(ROWS * COLUMNS)).view(ROWS, COLUMNS),
        "body.weight": torch.arange(100.0, 100 + COLUMNS * COLUMNS).view(COLUMNS, COLUMNS),
        "body.bias": torch.arange(200.0, 200 + COLUMNS),
    }


def write(directory: Path, base: str = "model") -> Path:
    """A directory of two files, an index, and what else lies there."""
    directory.mkdir()
    state = weights()
    files = {
        f"{base}-00001-of-00002.safetensors": ["embedding.weight"],
        f"{base}-00002-of-00002.safetensors": ["body.weight", "body.bias"],
    }
    for file, names in files.items():
        save_file({name: state[name] for name in names}, directory / file, {"format": "pt"})
    weight_map = {name: file for file, names in files.items() for name in names}
    (directory / f"{base}.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": weight_map})
    )
    (directory / "config.json").write_text("{}")
    return directory


def assert_filled(model: Tied) -> None:
    state = model.state_dict()
    expected = weights() | {"head.weight": weights()["embedding.weight"]}
    assert {name for name in expected if not torch.equal(state[name], expected[name])} == set()
    assert model.head.weight is model.embedding.weight


@pytest.mark.parametrize("base", ["model", "diffusion_pytorch_model"])
def test_module_with_tied_weights_is_filled_from_names_of_one_of_them(tmp_path: Path, base: str) -> None:
    path = write(tmp_path / "weights", base)
    model = Tied()
    loaded = load_checkpoint(path, into=model)
    assert_filled(model)
    assert (loaded.missing, loaded.unexpected) == ((), ())


def test_one_file_beside_others(tmp_path: Path) -> None:
    save_file(weights(), tmp_path / "model.safetensors", {"format": "pt"})
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    model = Tied()
    load_checkpoint(tmp_path, into=model)
    assert_filled(model)


def test_either_tied_name_fills_both(tmp_path: Path) -> None:
    state = weights()
    state["head.weight"] = state.pop("embedding.weight")
    save_file(state, tmp_path / "model.safetensors")
    model = Tied()
    load_checkpoint(tmp_path, into=model)
    assert_filled(model)


def test_tied_names_with_new_names_and_prefixes(tmp_path: Path) -> None:
    path = write(tmp_path / "weights")
    for options, into in (
        ({"rename": lambda name: f"net.{name}"}, {"net": Tied()}),
        ({"rename": {"embedding": "net.embedding", "body": "net.body"}}, {"net": Tied()}),
    ):
        load_checkpoint(path, into, **options)
        assert_filled(into["net"])
    wrapped = nn.ModuleDict({"module": Tied()})  # names as those of DistributedDataParallel
    load_checkpoint(path, into=wrapped, strip_prefix="module.")
    assert_filled(wrapped["module"])


def test_tied_tensors_of_a_plain_mapping_stay(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "model.safetensors")
    shared = torch.zeros(3)
    into = {"a": shared, "b": shared}
    load_checkpoint(tmp_path, into)
    assert into["a"] is shared and into["b"] is shared and shared.tolist() == [1, 1, 1]


@pytest.mark.parametrize("missing", ["body.bias", "embedding.weight"])
def test_name_that_no_tied_name_fills_is_missing(tmp_path: Path, missing: str) -> None:
    state = weights()
    del state[missing]
    save_file(state, tmp_path / "model.safetensors")
    model = Tied()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(StateMismatchError, match=rf"state\['{missing}'\]: is in the target but not in the checkpoint"):
        load_checkpoint(tmp_path, into={"state": model}, rename=lambda name: f"state.{name}")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_weights_that_are_not_tied_here_are_missing(tmp_path: Path) -> None:
    path = write(tmp_path / "weights")
    model = Tied()
    model.head.weight = nn.Parameter(torch.zeros(ROWS, COLUMNS))
    with pytest.raises(StateMismatchError, match=r"'head\.weight'\]: is in the target but not in the checkpoint"):
        load_checkpoint(path, into={"m": model}, rename=lambda name: f"m.{name}")
    part = load_checkpoint(path, into={"m": model}, rename=lambda name: f"m.{name}", strict=False)
    assert part.missing == ("m.head.weight",) and not model.head.weight.any()


def test_missing_file_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "weights")
    (path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CorruptCheckpointError, match=r"names model-00002-of-00002\.safetensors, which is missing"):
        load_checkpoint(path, into=Tied())


def test_name_in_two_files_is_named_with_both(tmp_path: Path) -> None:
    path = write(tmp_path / "weights")
    extra = {"body.bias": torch.zeros(COLUMNS), "unlisted": torch.zeros(1)}
    save_file(extra | {"body.weight": weights()["body.weight"]}, path / "model-00002-of-00002.safetensors")
    save_file(
        {"embedding.weight": weights()["embedding.weight"], "unlisted": torch.ones(1)},
        path / "model-00001-of-00002.safetensors",
    )
    with pytest.raises(
        CorruptCheckpointError, match=r"unlisted is in two files, model-00001-of-.* and model-00002-of-"
    ):
        load_checkpoint(path)


def test_name_twice_in_the_index_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "weights")
    index = path / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"body.bias"', '"body.weight"'))
    with pytest.raises(CorruptCheckpointError, match=r"the name body\.weight occurs twice"):
        load_checkpoint(path)


class _Counted:
    """How many bytes of tensors are read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.nbytes = 0
        self._preadv = os.preadv
        monkeypatch.setattr(os, "preadv", self._count)

    def _count(self, *args: Any) -> int:
        count = self._preadv(*args)
        self.nbytes += count
        return count


def test_only_what_is_asked_for_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "weights")
    counted = _Counted(monkeypatch)
    load_checkpoint(path, into={"body": {"bias": torch.zeros(COLUMNS)}}, keys="body.bias")
    assert counted.nbytes == COLUMNS * 4
    load_checkpoint(path, keys="body.*")
    assert counted.nbytes == COLUMNS * 4 + COLUMNS * (COLUMNS + 1) * 4


def load_sharded(rank: int, directory: str) -> dict[str, Any]:
    """Load into FSDP2: which tensors are as they should be, and how many bytes this rank has read."""
    model = Tied()
    fully_shard(model)
    with pytest.MonkeyPatch.context() as patch:
        counted = _Counted(patch)
        loaded = load_checkpoint(directory + "/weights", into=model)
    expected = weights() | {"head.weight": weights()["embedding.weight"]}
    state = model.state_dict()
    good = {name: bool(torch.equal(state[name].full_tensor(), tensor)) for name, tensor in expected.items()}
    own = sum(p.to_local().nbytes for p in model.parameters() if isinstance(p, DTensor))
    nbytes = torch.tensor(counted.nbytes)
    dist.all_reduce(nbytes)
    return {"good": good, "missing": loaded.missing, "read": counted.nbytes, "own": own, "all": nbytes.item()}


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_each_rank_reads_its_rows_alone(tmp_path: Path, world_size: int) -> None:
    """On four ranks, of six rows one rank has none, and knows all the same that the head is tied."""
    write(tmp_path / "weights")
    for result in run_ranks("tests.loading.test_weight_directories:load_sharded", world_size, tmp_path):
        assert all(result["good"].values()), result["good"]
        assert result["missing"] == []
        assert result["read"] == result["own"]
        assert result["all"] == sum(tensor.nbytes for tensor in weights().values())
