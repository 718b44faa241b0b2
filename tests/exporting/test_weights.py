"""A directory of weights in the layout of transformers: which files, which names, which bytes; and what never happens."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from stager import (
    ArgumentError,
    Checkpointer,
    CorruptCheckpointError,
    StateMismatchError,
    StorageError,
    UnstageableError,
    UsageError,
    export_weights,
    load_checkpoint,
)
from stager.workers.checkpoint.formats import FORMATS
from stager.workers.errors import MemoryBudgetError
from tests.cli.conftest import Outcome, flip_bit
from tests.exporting.sharded import chunked_checkpoint
from tests.persistence.tasks import save
from tests.states import same

WEIGHTS = {"keys": "model", "strip_prefix": "model."}


def tied_model() -> nn.Sequential:
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 8, bias=False))
    model[3].weight = model[0].weight
    return model


def all_of(directory: Path) -> dict[str, torch.Tensor]:
    """What lies in the files, by the safetensors library."""
    loaded: dict[str, torch.Tensor] = {}
    for path in directory.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            assert name not in loaded, "a name in two files"
            loaded[name] = tensor
    return loaded


def assert_holds(directory: Path, expected: dict[str, torch.Tensor]) -> None:
    """The directory has these weights, bit for bit, and no others."""
    loaded = all_of(directory)
    assert loaded.keys() == expected.keys()
    different = [name for name, tensor in expected.items() if not same(loaded[name], tensor.contiguous())]
    assert not different


@pytest.mark.parametrize("kind", FORMATS)
def test_weights_of_any_format_in_one_file(run_dir: Path, tmp_path: Path, kind: str) -> None:
    model = tied_model()
    save(run_dir, {"model": model, "epoch": 3}, kind=kind, num_parts=2, num_files=2, segment_bytes=100)
    result = export_weights(run_dir, tmp_path / "out", **WEIGHTS)
    assert os.listdir(tmp_path / "out") == ["model.safetensors"] == list(result.files)
    wanted = model.state_dict()
    del wanted["3.weight"]
    assert_holds(tmp_path / "out", dict(wanted))
    assert (result.num_tensors, result.step, result.tied) == (len(wanted), 1, {"3.weight": "0.weight"})
    assert result.nbytes == sum(tensor.nbytes for tensor in wanted.values())
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as opened:
        assert opened.metadata()["format"] == "pt"
    again = tied_model()
    load_checkpoint(tmp_path / "out", into=again)
    assert same(dict(again.state_dict()), dict(model.state_dict()))


def test_several_files_have_an_index_and_no_more_bytes_than_was_asked_for(run_dir: Path, tmp_path: Path) -> None:
    state = {f"layer{number}": torch.randn(number + 1, 10) for number in range(9)} | {"large": torch.randn(40, 10)}
    save(run_dir, state)
    result = export_weights(run_dir, tmp_path / "out", max_shard_bytes="800B")
    names = sorted(os.listdir(tmp_path / "out"))
    count = len(result.files)
    assert names == [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)] + [
        "model.safetensors.index.json"
    ]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in state.values())}
    assert index["weight_map"].keys() == state.keys()
    for name in result.files:
        found = load_file(tmp_path / "out" / name)
        assert {index["weight_map"][key] for key in found} == {name}
        nbytes = sum(tensor.nbytes for tensor in found.values())
        assert nbytes <= 800 or list(found) == ["large"]
    assert_holds(tmp_path / "out", state)
    loaded = load_checkpoint(tmp_path / "out").state
    assert loaded.keys() == state.keys() and all(same(loaded[name], state[name]) for name in state)


@pytest.mark.parametrize("most", ["300B", "5GB"])
def test_tensors_in_chunks_become_whole(tmp_path: Path, most: str) -> None:
    path, whole = chunked_checkpoint(tmp_path)
    result = export_weights(path, tmp_path / "out", max_shard_bytes=most)
    assert_holds(tmp_path / "out", whole)
    assert result.left_out == ("n",)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16, "float64"])
def test_dtype_converts_floating_point_tensors_alone(run_dir: Path, tmp_path: Path, dtype: Any) -> None:
    state = {
        "float": torch.randn(7, 5),
        "double": torch.randn(70_001).double(),
        "wide": torch.randn(5, 7).t(),
        "half": torch.randn(3).half(),
        "eight": torch.randn(9).to(torch.float8_e4m3fn),
        "count": torch.arange(3),
        "mask": torch.tensor([True, False]),
        "special": torch.tensor([float("inf"), float("nan"), -0.0]),
        "none": torch.ones(0, 2),
    }
    save(run_dir, state, segment_bytes=1001)
    export_weights(run_dir, tmp_path / "out", dtype=dtype)
    wanted = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)
    stay = {"eight", "count", "mask"}
    assert_holds(tmp_path / "out", {n: t if n in stay else t.to(wanted) for n, t in state.items()})


def test_dtype_of_tensors_in_chunks(tmp_path: Path) -> None:
    path, whole = chunked_checkpoint(tmp_path)
    export_weights(path, tmp_path / "out", dtype="bfloat16")
    assert_holds(tmp_path / "out", {name: tensor.bfloat16() for name, tensor in whole.items()})


def test_value_that_the_dtype_cannot_hold_is_named(run_dir: Path, tmp_path: Path) -> None:
    save(run_dir, {"fine": torch.ones(3), "w": torch.tensor([1.0, 70_000.0])})
    with pytest.raises(UnstageableError, match=r"^w: has values beyond 65504, the largest of torch.float16"):
        export_weights(run_dir, tmp_path / "out", dtype="float16")
    assert os.listdir(tmp_path) == ["run"]
    with pytest.raises(UsageError, match=r"dtype .* is 'int8'; weights can be converted to float64, float32"):
        export_weights(run_dir, tmp_path / "out", dtype="int8")


def _without_head(name: str) -> str | None:
    return None if name.startswith("head") else name.replace("body", "model")


@pytest.mark.parametrize(
    "rename", [_without_head, {"body": "model", "head": None}, {"body.w": "model.w", "body": "model", "head.w": None}]
)
def test_rename_gives_new_names_and_leaves_out(run_dir: Path, tmp_path: Path, rename: Any) -> None:
    state = {"body": {"w": torch.ones(2), "b": torch.zeros(2)}, "head": {"w": torch.ones(3)}}
    save(run_dir, state)
    result = export_weights(run_dir, tmp_path / "out", rename=rename)
    assert_holds(tmp_path / "out", {f"model.{name}": tensor for name, tensor in state["body"].items()})
    assert result.renamed_away == ("head.w",)


def test_rename_says_which_of_tied_names_is_kept(run_dir: Path, tmp_path: Path) -> None:
    weight = torch.randn(3)
    save(run_dir, {"a": weight, "b": weight, "c": weight})
    result = export_weights(run_dir, tmp_path / "out", rename={"a": None})
    assert list(all_of(tmp_path / "out")) == ["b"] and result.tied == {"c": "b"}
    result = export_weights(run_dir, tmp_path / "one", rename=lambda name: "all")  # one tensor: no collision
    assert list(all_of(tmp_path / "one")) == ["all"] and result.tied == {}


def _raises(name: str) -> str:
    raise KeyError(name)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"rename": lambda name: "x"}, StateMismatchError, r"a\.w and b get the same name, x; nothing was written"),
        ({"rename": {"b": "a.w"}}, StateMismatchError, r"a\.w and b get the same name, a\.w"),
        ({"rename": {"a.v": "x"}}, StateMismatchError, r"has 'a\.v', which is no name .* Similar names: a\.w"),
        ({"rename": lambda name: 5}, UsageError, r"rename made 5 of 'a\.w'"),
        ({"rename": _raises}, UsageError, r"rename raised KeyError for the name 'a\.w'"),
        ({"rename": "a.w"}, UsageError, r"rename is a str; give a mapping"),
        ({"rename": lambda name: None}, StateMismatchError, r"no tensor is left .* left out all 3 names"),
        ({"keys": "n"}, StateMismatchError, r"no tensor is left .* keys selects 1 objects"),
        ({"keys": "modle"}, StateMismatchError, r"no key matches keys='modle'"),
        ({"strip_prefix": "model."}, StateMismatchError, r"no name of what is exported begins with"),
        ({"max_shard_bytes": "much"}, ArgumentError, r"max_shard_bytes must be a size"),
        ({"max_shard_bytes": 0}, ArgumentError, r"max_shard_bytes is 0"),
        ({"max_memory_bytes": 1000}, UsageError, r"max_memory_bytes is 1,000 bytes; it must be at least"),
        ({"sidecars": ["nowhere.json"]}, UsageError, r"nowhere\.json: does not exist, or is no file"),
        ({"sidecars": ["."]}, UsageError, r"is a directory; name its files"),
        ({"sidecars": "config.json"}, UsageError, r"sidecars is one path, config\.json; give a list"),
    ],
)
def test_what_cannot_be_meant_is_said_and_nothing_is_written(
    run_dir: Path, tmp_path: Path, options: dict[str, Any], error: type[Exception], says: str
) -> None:
    save(run_dir, {"a": {"w": torch.ones(2)}, "b": torch.ones(3), "c": torch.ones(1), "n": {1, 2}})
    with pytest.raises(error, match=says):
        export_weights(run_dir, tmp_path / "out", **options)
    assert os.listdir(tmp_path) == ["run"]


def test_two_keys_that_join_to_one_name_collide(run_dir: Path, tmp_path: Path) -> None:
    save(run_dir, {"a.w": torch.ones(2), "a": {"w": torch.zeros(2)}})
    with pytest.raises(StateMismatchError, match=r"get the same name, a\.w"):
        export_weights(run_dir, tmp_path / "out")


def test_what_safetensors_or_the_budget_cannot_hold_is_named(run_dir: Path, tmp_path: Path) -> None:
    save(run_dir, {"fine": torch.ones(2), "c": torch.ones(2, dtype=torch.complex128)})
    with pytest.raises(UnstageableError, match=r"^c: has dtype complex128, which safetensors cannot store"):
        export_weights(run_dir, tmp_path / "out")
    save(run_dir, {"wide": torch.ones(2000, 1000).t()}, step=2)
    with pytest.raises(MemoryBudgetError, match=r"^wide: is stored with strides"):
        export_weights(run_dir, tmp_path / "out", max_memory_bytes="4MiB")
    assert os.listdir(tmp_path) == ["run"]


def test_sidecars_are_copied_beside_the_weights(run_dir: Path, tmp_path: Path) -> None:
    save(run_dir, {"w": torch.ones(2)})
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "config.json").write_text(f'{{"n": {number}}}')
    link = tmp_path / "tokenizer.json"
    link.symlink_to(tmp_path / "2" / "config.json")  # as in the cache of the Hugging Face hub
    result = export_weights(run_dir, tmp_path / "out", sidecars=[tmp_path / "1" / "config.json", link])
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert (tmp_path / "out" / "config.json").read_text() == '{"n": 1}'
    assert not (tmp_path / "out" / "tokenizer.json").is_symlink()
    assert result.sidecars == ("config.json", "tokenizer.json")
    both = [tmp_path / "1" / "config.json", tmp_path / "2" / "config.json"]
    with pytest.raises(UsageError, match=r"1/config\.json and .*2/config\.json have the same name"):
        export_weights(run_dir, tmp_path / "other", sidecars=both)
    (tmp_path / "model.safetensors").write_text("")
    with pytest.raises(UsageError, match="has the name of a file of weights"):
        export_weights(run_dir, tmp_path / "other", sidecars=[tmp_path / "model.safetensors"])


def _exchanges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the file system as it is."""


def _does_not_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    from stager.workers.checkpoint.storage.posix import files

    monkeypatch.setattr(files, "exchange", lambda first, second: False)


@pytest.mark.parametrize("file_system", [_exchanges, _does_not_exchange])
def test_force_replaces_an_export_and_nothing_else(
    run_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    file_system: Callable[[pytest.MonkeyPatch], None],
) -> None:
    file_system(monkeypatch)
    save(run_dir, {"w": torch.ones(2), "v": torch.ones(3)})
    (tmp_path / "config.json").write_text("{}")
    out = tmp_path / "out"
    out.mkdir()  # an empty directory is no obstacle
    export_weights(run_dir, out, sidecars=[tmp_path / "config.json"], max_shard_bytes=8)
    before = sorted(os.listdir(out))
    with pytest.raises(UsageError, match=r"exists already; .*force=True"):
        export_weights(run_dir, out)
    assert sorted(os.listdir(out)) == before
    export_weights(run_dir, out, force=True)
    assert os.listdir(out) == ["model.safetensors"]
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"has more in it than the export that it was: notes\.txt; move that away"):
        export_weights(run_dir, out, force=True)
    assert sorted(os.listdir(out)) == ["model.safetensors", "notes.txt"]
    assert sorted(os.listdir(tmp_path)) == ["config.json", "out", "run"]


def test_what_somebody_else_wrote_is_never_replaced(run_dir: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save(run_dir, {"w": torch.ones(2)})
    (tmp_path / "model").mkdir()
    save_file({"w": torch.zeros(2)}, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name, says in (
        ("model", r"has files in it \(model\.safetensors\), which no export of weights wrote"),
        ("run", r"has files in it .*, which no export of weights wrote"),
        ("file", "is a file; name a directory"),
        ("link", "is a link; name a directory"),
    ):
        with pytest.raises(UsageError, match=says):
            export_weights(run_dir, tmp_path / name, force=True)
    assert load_file(tmp_path / "model" / "model.safetensors")["w"].sum() == 0
    with pytest.raises(StorageError, match=r"nowhere does not exist; create it"):
        export_weights(run_dir, tmp_path / "nowhere" / "out")


def test_what_came_meanwhile_is_not_replaced(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(run_dir, {"w": torch.ones(2)})
    out, fsync = tmp_path / "out", os.fsync

    def sync_and_come(fd: int) -> None:
        fsync(fd)
        out.mkdir(exist_ok=True)
        (out / "theirs").write_text("mine")

    monkeypatch.setattr(os, "fsync", sync_and_come)
    with pytest.raises(UsageError, match="which no export of weights wrote"):
        export_weights(run_dir, out, force=True)
    assert (out / "theirs").read_text() == "mine" and sorted(os.listdir(tmp_path)) == ["out", "run"]


@pytest.mark.parametrize("most", ["100KB", "5GB"])
def test_damaged_source_leaves_nothing(run_dir: Path, tmp_path: Path, most: str) -> None:
    info = save(run_dir, {"x": torch.arange(90_000), "y": torch.ones(3)}, num_parts=1, segment_bytes=100_000)
    flip_bit(Path(info.path) / "__0_0.distcp", 500_000)
    with pytest.raises(CorruptCheckpointError, match=r"__0_0\.distcp: the bytes from 500000 on are damaged"):
        export_weights(run_dir, tmp_path / "out", max_shard_bytes=most)
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize("call", ["fsync", "pwritev", "ftruncate", "mkdir", "rename"])
def test_storage_that_fails_leaves_nothing(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    save(run_dir, {"a": torch.ones(300), "b": torch.ones(300)})

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(StorageError) as caught:
            export_weights(run_dir, tmp_path / "out", max_shard_bytes=1200)
    assert caught.value.errno == errno.ENOSPC and os.listdir(tmp_path) == ["run"]


CHILD = """
import json, resource, sys
from stager import export_weights
import torch
torch.ones(8).to(torch.bfloat16)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
result = export_weights(sys.argv[1], sys.argv[2], dtype=sys.argv[3] or None, max_memory_bytes=int(sys.argv[4]))
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([(after - before) * 1024, result.nbytes]))
"""


@pytest.mark.parametrize("dtype", ["", pytest.param("float64", marks=pytest.mark.long)])
def test_peak_memory_stays_within_the_budget_of_a_state_eight_times_as_large(
    run_dir: Path, tmp_path: Path, dtype: str
) -> None:
    budget = 16 << 20
    save(run_dir, {"one": torch.ones(24 << 20), "rest": [torch.ones(4 << 20) for _ in range(2)]}, fsync=False)
    command = [sys.executable, "-c", CHILD, str(run_dir), str(tmp_path / "out"), dtype, str(budget)]
    grown, nbytes = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert nbytes >= 8 * budget
    assert grown <= budget


def test_progress_counts_what_is_read(run_dir: Path, tmp_path: Path) -> None:
    info = save(run_dir, {"a": torch.ones(3000), "other": torch.ones(50_000)})
    counted: list[int] = []
    export_weights(info.path, tmp_path / "out", keys="a", progress=counted.append)
    assert 12_000 <= sum(counted) < 50_000


def test_command(saved_run: Path, tmp_path: Path) -> None:
    out, config = tmp_path / "out", tmp_path / "config.json"
    config.write_text("{}")
    weights = "--layout", "hf", "--keys", "model", "--strip-prefix", "model."
    answer = Outcome("export", saved_run, out, *weights, "--step", "20", "--file", config, "--json").json
    assert (answer["step"], answer["files"], answer["sidecars"]) == (20, ["model.safetensors"], ["config.json"])
    assert answer["tied"] == {"tied": "weight"}
    again = Outcome("export", saved_run, out, *weights)
    assert again.code == 2 and "--force" in again.err
    few = Outcome("export", saved_run, out, *weights, "--force", "--max-shard-size", "100KB", "--dtype", "bfloat16")
    assert few.code == 0 and "2 files of weights" in few.out and "tied is stored as weight" in few.out
    assert {tensor.dtype for tensor in all_of(out).values()} == {torch.bfloat16}
    everything = Outcome("export", saved_run, tmp_path / "all", "--layout", "hf")
    assert everything.code == 0 and "left out, because safetensors holds tensors only: data" in everything.out
    for options, says in (
        (("--layout", "hf", "--format", "torch"), "--format is an option of --layout file"),
        (("--layout", "hf", "--allow-pickle"), "--allow-pickle is an option of --layout file"),
        (("--dtype", "bfloat16"), "--dtype is an option of --layout hf"),
        (("--file", str(config)), "--file is an option of --layout hf"),
        (("--layout", "hf", "--max-shard-size", "much"), "--max-shard-size much"),
    ):
        refused = Outcome("export", saved_run, tmp_path / "no", *options)
        assert refused.code == 2 and says in refused.err


def test_command_renames(saved_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "names.json").write_text('{"weight": "wte.weight", "scale": null}')
    (tmp_path / "names.yaml").write_text("weight: wte.weight\nscale:\n")
    (tmp_path / "my_names.py").write_text(
        "def rename(name):\n    return None if name == 'scale' else name.replace('weight', 'wte.weight')\nVALUE = 5\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))  # the current directory is put into it
    weights = "--layout", "hf", "--keys", "model", "--strip-prefix", "model.", "--rename"
    for number, rename in enumerate(("names.json", "names.yaml", "my_names.py:rename", "my_names:rename")):
        outcome = Outcome("export", saved_run, tmp_path / str(number), *weights, rename)
        assert outcome.code == 0 and "left out, by --rename: scale" in outcome.out, outcome.err
        assert list(all_of(tmp_path / str(number))) == ["wte.weight"]
    monkeypatch.delitem(sys.modules, "my_names")
    (tmp_path / "list.json").write_text('["weight"]')
    (tmp_path / "number.yaml").write_text("weight: 5\n")
    (tmp_path / "broken.json").write_text("{")
    for rename, says, code in (
        ("names", "names neither a file nor a function", 2),
        ("nowhere.json", "cannot read", 1),
        ("nowhere:rename", "cannot import nowhere (ModuleNotFoundError", 2),
        ("nowhere.py:rename", "cannot import nowhere.py", 2),
        ("my_names.py:VALUE", "my_names.py has no function VALUE", 2),
        ("list.json", "has no mapping of names", 2),
        ("number.yaml", "has 'weight': 5", 2),
        ("broken.json", "is neither JSON nor YAML", 2),
    ):
        outcome = Outcome("export", saved_run, tmp_path / "no", *weights, rename)
        assert (outcome.code, says in outcome.err) == (code, True), (rename, outcome.err)


def test_files_that_were_saved_with_the_checkpoint_go_with_its_weights(run_dir: Path, tmp_path: Path) -> None:
    with Checkpointer(run_dir, {"workers": {"count": 1}, "persistence": {"fsync": False}}) as ckpt:
        files = {"config.json": b"saved", "vocab.txt": b"a b", "model.safetensors": b"not weights"}
        ckpt.save(1, {"x": torch.ones(3)}, files=files).upload_completion.result()
    (tmp_path / "config.json").write_bytes(b"named")
    result = export_weights(run_dir, tmp_path / "out", sidecars=[tmp_path / "config.json"])
    assert sorted(result.sidecars) == ["config.json", "vocab.txt"]
    assert (tmp_path / "out" / "config.json").read_bytes() == b"named"
    assert (tmp_path / "out" / "vocab.txt").read_bytes() == b"a b"
    (run_dir / "step-00000001" / "vocab.txt").write_bytes(b"a c")
    with pytest.raises(CorruptCheckpointError, match=r"vocab\.txt"):
        export_weights(run_dir, tmp_path / "other")
    assert not (tmp_path / "other").exists()
