"""What every format promises, the same tests for each."""

from __future__ import annotations

import functools
import itertools
import operator
import random
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stager import Checkpointer, UnstageableError
from stager.workers.checkpoint.commit.persist import persist_part
from stager.workers.checkpoint.directory.run_directory import list_checkpoints, partial_names, read_checkpoint
from stager.workers.checkpoint.formats import FORMATS
from stager.workers.checkpoint.layout.structure import fqn
from stager.workers.checkpoint.maintenance.recover import recover
from stager.workers.checkpoint.read.verify import verify_checkpoint
from tests.faults import Faults
from tests.formats.stock import read_stock
from tests.persistence.tasks import Crash, failing_call, in_turn, load, make_task, run, save
from tests.persistence.test_write import _STATES, with_tensors
from tests.states import everything, same

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),  # torch.load's own way with quantized tensors
]


def leaves(state: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """As stager has them."""
    if isinstance(state, dict):
        for key, value in state.items():
            yield from leaves(value, (*path, key))
    elif isinstance(state, list) and any(isinstance(value, (torch.Tensor, dict)) for value in state):
        for index, value in enumerate(state):
            yield from leaves(value, (*path, index))
    else:
        yield path, state


@pytest.mark.parametrize("segment_bytes", [64, 64 << 20])
def test_everything_round_trips_and_verifies(run_dir: Path, kind: str, segment_bytes: int) -> None:
    state = everything()
    info = save(run_dir, state, kind=kind, num_parts=5, num_files=3, segment_bytes=segment_bytes)
    assert info.format == kind
    assert verify_checkpoint(info.path).problems == ()
    assert same(load(info), state)
    assert not partial_names(str(run_dir))


@pytest.mark.parametrize(
    "state",
    [{}, {"a": {}}, {"a": {"b": {}}, "l": []}, {"n": None}, {"only": 1, "objects": "x"}, {"e": torch.empty(0)}],
    ids=str,
)
@pytest.mark.parametrize("num_parts", [1, 3])
def test_states_with_next_to_nothing_in_them(run_dir: Path, kind: str, state: dict[str, Any], num_parts: int) -> None:
    info = save(run_dir, state, kind=kind, num_parts=num_parts)
    assert verify_checkpoint(info.path).ok and same(load(info), state)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(state=_STATES, num_parts=st.integers(1, 4), segment_bytes=st.integers(20, 2000))
def test_any_nested_state_round_trips(
    tmp_path: Path, kind: str, state: Any, num_parts: int, segment_bytes: int
) -> None:
    state = with_tensors(state)
    options = {"num_parts": num_parts, "num_files": num_parts, "segment_bytes": segment_bytes, "fsync": False}
    info = save(tmp_path / "run", state, kind=kind, **options)
    assert verify_checkpoint(info.path).ok
    assert same(load(info), state)


def test_parts_in_any_order_give_the_same_files(tmp_path: Path, kind: str) -> None:
    contents = set()
    for number, order in enumerate(itertools.permutations(range(3))):
        directory = tmp_path / str(number)
        directory.mkdir()
        job = make_task(directory, everything(), kind=kind, num_parts=3, num_files=2, segment_bytes=256)
        committed = [persist_part(job, part).committed for part in order]
        assert [c is not None for c in committed] == [False, False, True]
        path = Path(committed[-1].info.path)
        names = sorted(p for p in path.iterdir() if p.name not in ("manifest.json", ".metadata"))
        contents.add(tuple((p.name, p.read_bytes()) for p in names))
    assert len(contents) == 1


def test_stock_library_reads_every_tensor_without_stager(run_dir: Path, kind: str, elsewhere: Path) -> None:
    state = everything()
    info = save(run_dir, state, kind=kind, num_parts=3, num_files=2, segment_bytes=300)
    read = read_stock(kind, info.path, elsewhere)
    if kind != "safetensors":
        for path, value in leaves(state):
            if kind == "torch" or path[0] != "ints":  # DCP makes strings of keys
                assert same(functools.reduce(operator.getitem, path, read), value), path
        return
    _, manifest = read_checkpoint(str(run_dir), 1)
    stored = {fqn(path) for path, index in manifest.paths() if manifest.layout.items[index].kind == "tensor"}
    assert stored == {*read["tensors"], *read["tied"]}
    for path, value in leaves(state):
        if (name := fqn(path)) in stored:
            assert same(read["tensors"][read["tied"].get(name, name)], value), name


def test_torch_file_keeps_containers_keys_and_ties(run_dir: Path, elsewhere: Path) -> None:
    shared = torch.arange(5.0)
    state = {
        "odict": OrderedDict(b=torch.ones(2), a=1),
        "keys": {1: torch.zeros(2), None: "n", 2.5: torch.ones(1), "a": [torch.ones(1), {"x": ()}]},
        "tied": {"a": shared, "b": shared},
        "in objects": [(shared, "0", shared[1:]), ("0", torch.ones(3, dtype=torch.complex128), "o2.0")],
        "module": torch.nn.BatchNorm1d(3).state_dict(),
        "sparse": torch.eye(3).to_sparse(),
    }
    info = save(run_dir, state, kind="torch", num_parts=2)
    read = read_stock("torch", info.path, elsewhere)
    assert same(read, state)
    assert type(read["odict"]) is OrderedDict and list(map(type, read["keys"])) == [int, type(None), float, str]
    assert read["tied"]["a"].data_ptr() == read["tied"]["b"].data_ptr()
    first, _, view = read["in objects"][0]
    assert view.data_ptr() == first.data_ptr() + 4
    assert read["module"]._metadata == state["module"]._metadata


def test_records_of_a_torch_file_lie_where_mmap_needs_them(run_dir: Path) -> None:
    """Storages at multiples of 64; what is no tensor's raw bytes has its checksum."""
    state = {f"t{n}": torch.ones(n, dtype=torch.uint8) for n in range(130)} | {"o": (torch.ones(3), 1)}
    info = save(run_dir, state, kind="torch", num_parts=3)
    with zipfile.ZipFile(Path(info.path) / "state.pt") as archive:
        for entry in archive.infolist():
            with archive.open(entry) as record:
                record.read(0)
                assert archive.fp is not None and archive.fp.tell() % 64 == 0, entry
            if not re.fullmatch(r"archive/data/\d+", entry.filename):
                archive.read(entry)  # checks the checksum
        assert len(archive.infolist()) == 130 + 1 + 3


def test_plan_of_a_state_whose_objects_grow_stays(run_dir: Path, kind: str) -> None:
    """What changes its length comes last: no tensor moves."""
    places = []
    for step, text in enumerate(("", "x" * 50_000)):
        save(run_dir, {"text": text, "t": torch.ones(5), "u": torch.ones(7).int()}, kind=kind, step=step)
        items = read_checkpoint(str(run_dir), step)[1].layout.items
        places.append([(item.file, item.data_offset) for item in items if item.kind == "tensor"])
    assert places[0] == places[1]


def test_flipped_bits_are_found_by_verify_in_every_file(run_dir: Path, kind: str) -> None:
    state = {"a": torch.arange(9), "b": {"c": torch.ones(3, dtype=torch.bfloat16), "n": 3, "z": torch.ones(2, 0)}}
    info = save(run_dir, state, kind=kind, num_parts=2, num_files=2, segment_bytes=200)
    rng = random.Random(0)
    for path in sorted(Path(info.path).iterdir()):
        whole = path.read_bytes()
        for position in {0, len(whole) - 1, *rng.sample(range(len(whole)), min(len(whole), 40))}:
            damaged = bytearray(whole)
            damaged[position] ^= 1 << rng.randrange(8)
            path.write_bytes(damaged)
            assert not verify_checkpoint(info.path, num_threads=1).ok, (path.name, position)
        path.write_bytes(whole)
    assert verify_checkpoint(info.path).ok


def test_crash_at_any_system_call_and_the_next_run_recovers(tmp_path: Path, kind: str) -> None:
    """Afterwards there is the older checkpoint alone, or the new one as well; each is whole."""
    outcomes = set()
    old: dict[str, Any] = {"x": torch.ones(5)}
    new = {"n": torch.arange(50.0), "m": torch.ones(3).int(), "o": ["x", 1]}

    def attempt(number: int) -> bool:
        directory = tmp_path / str(number)
        save(directory, old, kind=kind, step=1, fsync=False)
        job = make_task(directory, new, kind=kind, step=2, num_files=2, segment_bytes=100)
        with failing_call(number, Crash) as fired:
            with suppress(Crash):
                run(job)
            happened = fired()
        recover(str(directory))
        found, skipped = list_checkpoints(directory)
        assert not skipped and not partial_names(str(directory))
        for info in found:
            assert verify_checkpoint(info.path).ok
            assert same(load(info), old if info.step == 1 else new), number
        outcomes.add(tuple(info.step for info in found))
        return happened

    assert in_turn(attempt) > 20
    assert outcomes == {(1,), (1, 2)}


@pytest.mark.parametrize(
    "points",
    [
        ("part.write",),
        pytest.param(("part.receipt", "commit.begin", "commit.indexed", "commit.manifest"), marks=pytest.mark.long),
    ],
    ids=["writing", "every point"],
)
@pytest.mark.parametrize(
    "kind", [name for name in FORMATS if name != "dcp"]
)  # tests/persistence/test_workers.py has it
def test_worker_killed_in_a_save_is_replaced_and_the_run_resumes(
    run_dir: Path, faults: Faults, kind: str, points: tuple[str, ...]
) -> None:
    """``save``, ``latest``, ``load`` and ``load(into=)`` through the Checkpointer, with a worker killed in each save."""
    model = torch.nn.Sequential(torch.nn.Linear(300, 900), torch.nn.Linear(900, 300))
    optimizer = torch.optim.AdamW(model.parameters())
    extra: dict[str, Any] = {"rng": torch.get_rng_state(), "step": 0}
    state = {"model": model, "optimizer": optimizer, "extra": extra}
    config = {"persistence": {"format": kind, "fsync": False, "segment_bytes": "256KiB"}, "workers": {"count": 2}}
    with Checkpointer(run_dir, config) as ckpt:
        for step, point in enumerate(points):
            model(torch.ones(1, 300)).sum().backward()
            optimizer.step()
            extra["step"] = step
            faults.arm(point, "kill")
            ckpt.save(step, state).upload_completion.result()
            assert faults.fired(point)
        kept = {name: value.clone() for name, value in model.state_dict().items()}
        latest = ckpt.latest()
        assert latest is not None and latest.format == kind and verify_checkpoint(latest.path).ok
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        loaded = ckpt.load(into=state)
        assert loaded is not None and loaded.step == extra["step"] == len(points) - 1
        assert same(dict(model.state_dict()), kept)


@pytest.mark.parametrize("kind", [name for name in FORMATS if name != "dcp"])  # tests/snapshot/test_pieces.py has it
def test_staged_in_pieces_is_the_same_checkpoint(run_dir: Path, kind: str) -> None:
    big = torch.randn(700, 900)
    state = {"big": big, "tied": big, "t": torch.randn(300, 400).t(), "n": list(range(50)), "o": (torch.ones(9), "x")}
    config = {
        "persistence": {"format": kind, "fsync": False},
        "arena": {"max_host_bytes": "2MiB"},
        "workers": {"count": 1},
    }
    with Checkpointer(run_dir, config) as ckpt:
        handle = ckpt.save(1, state)
        info = handle.upload_completion.result()
        assert "pieces" in handle.report.notes[0]
        assert verify_checkpoint(info.path).ok
        loaded = ckpt.load(1)
        assert loaded is not None and same(loaded.state, state)


@pytest.mark.parametrize("key", ["__metadata__", "lone \ud800"])
def test_name_that_safetensors_cannot_hold_is_refused_by_its_key_path(run_dir: Path, key: str) -> None:
    run_dir.mkdir()
    with pytest.raises(UnstageableError) as caught:
        make_task(run_dir, {key: torch.ones(1)}, kind="safetensors")
    assert caught.value.key_path == f"state[{key!r}]" if " " in key else key


@pytest.mark.parametrize("kind", ["dcp", "torch"])
def test_dtype_that_torch_save_cannot_write_is_refused_by_its_key_path(run_dir: Path, kind: str) -> None:
    run_dir.mkdir()
    odd = torch.ones(4, dtype=torch.uint8).view(torch.uint4) if hasattr(torch, "uint4") else None
    if odd is None:
        pytest.skip("this torch has no such dtype")
    with pytest.raises(UnstageableError) as caught:
        make_task(run_dir, {"a": [odd]}, kind=kind)
    assert caught.value.key_path == "a[0]"


def test_dtypes_that_safetensors_lacks_take_only_their_own_values_along(run_dir: Path) -> None:
    """As objects; a column of a large matrix does not bring the matrix."""
    matrix = torch.ones(300, 1000, dtype=torch.complex128)
    state = {"column": matrix[:, 3], "t": torch.ones(3)}
    info = save(run_dir, state, kind="safetensors")
    assert (info.num_tensors, info.num_objects) == (1, 1) and info.nbytes < 20_000
    assert same(load(info), state)


def test_formats_are_those_of_the_configuration() -> None:
    from stager.config.models import PersistenceConfig

    assert set(FORMATS) == set(PersistenceConfig.model_fields["format"].annotation.__args__)


@pytest.mark.parametrize("kind", sorted(FORMATS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.complex128])
def test_tied_tensors_are_tied_again_whatever_their_dtype(run_dir: Path, kind: str, dtype: torch.dtype) -> None:
    """safetensors has no complex numbers: those are objects there."""
    shared = torch.randn(30, dtype=dtype)
    state = {"a": shared, "n": 1, "b": [shared], "view": shared[:7], "other": shared.clone()}
    info = save(run_dir, state, kind=kind)
    loaded = load(info)
    assert same(loaded, state) and loaded["a"].data_ptr() == loaded["b"][0].data_ptr()
    assert len({loaded[name].data_ptr() for name in ("a", "view", "other")}) == 3
    fresh = functools.partial(torch.zeros, dtype=dtype)
    into = {"a": fresh(30), "n": 0, "b": [fresh(30)], "view": fresh(7), "other": fresh(30)}
    with Checkpointer(run_dir, read_only=True) as ckpt:
        ckpt.load(into=into)
    assert same(into, state)
