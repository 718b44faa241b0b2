"""Parts written in this process: what is in the files, for every shape of state; stock torch reads it."""

from __future__ import annotations

import io
import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stager.workers.checkpoint.commit.persist import persist_part
from stager.workers.checkpoint.directory.run_directory import partial_names, read_checkpoint
from stager.workers.checkpoint.read.verify import verify_checkpoint
from tests.persistence.tasks import load, make_task, run, save
from tests.states import bits, everything, same


def check(run_dir: Path, state: dict[str, Any], **options: Any) -> None:
    info = save(run_dir, state, **options)
    result = verify_checkpoint(info.path)
    assert result.ok, result.problems
    assert same(load(info), state)
    assert not partial_names(str(run_dir))


def test_one_of_each_kind_in_many_parts_files_and_segments(run_dir: Path) -> None:
    check(run_dir, everything(), num_parts=5, num_files=3, segment_bytes=128)


@pytest.mark.parametrize(
    "state",
    [{}, {"a": {}}, {"a": {"b": {}}, "l": []}, {"n": None}, {"only": 1, "objects": "x"}, {"e": torch.empty(0)}],
    ids=str,
)
@pytest.mark.parametrize("num_parts", [1, 3])
def test_states_with_next_to_nothing_in_them(run_dir: Path, state: dict[str, Any], num_parts: int) -> None:
    check(run_dir, state, num_parts=num_parts)


def test_one_large_tensor_over_many_segments_and_all_parts(run_dir: Path) -> None:
    state = {"big": torch.randint(0, 256, (3_000_001,), dtype=torch.uint8)}
    check(run_dir, state, num_parts=4, segment_bytes=100_000)
    manifest = read_checkpoint(str(run_dir), 1)[1]
    assert len(manifest.hashes[0]) == -(-manifest.layout.files[0].nbytes // 100_000)


def test_large_tensor_in_chunks_of_its_segment(run_dir: Path) -> None:
    """More than is written in one call, and not a multiple of it."""
    check(run_dir, {"big": torch.randint(-9, 9, (2_700_001,), dtype=torch.int32), "x": torch.ones(1)}, num_parts=1)


def test_thousands_of_small_tensors(run_dir: Path) -> None:
    rng = random.Random(0)
    shapes = [(), (1,), (3,), (0,), (2, 5), (300,)]
    state = {f"t{i}": torch.randn(rng.choice(shapes)) for i in range(4000)}
    check(run_dir, state, num_parts=3, num_files=2)


@pytest.mark.parametrize("segment_bytes", [1, 63, 64, 700, 1300])
def test_segments_that_cut_headers_data_tails_and_padding(run_dir: Path, segment_bytes: int) -> None:
    state = {"a": torch.arange(50), "b": torch.tensor(True), "c": "text", "d": torch.arange(3.0)}
    check(run_dir, state, num_parts=3, segment_bytes=segment_bytes)


def test_parts_in_any_order_give_the_same_files(run_dir: Path, tmp_path: Path) -> None:
    state = everything()
    contents = set()
    for number, order in enumerate(itertools.permutations(range(3))):
        directory = tmp_path / str(number)
        directory.mkdir()
        job = make_task(directory, state, num_parts=3, num_files=2, segment_bytes=256)
        committed = [persist_part(job, part).committed for part in order]
        assert [c is not None for c in committed] == [False, False, True]
        path = Path(committed[-1].info.path)
        contents.add(tuple(p.read_bytes() for p in sorted(path.glob("*.distcp"))))
    assert len(contents) == 1


_LEAVES = st.one_of(
    st.integers(-5, 5),
    st.text(max_size=3),
    st.tuples(st.lists(st.integers(0, 4), max_size=3), st.sampled_from(["float32", "bool", "bfloat16", "complex128"])),
)
_STATES = st.dictionaries(
    st.text("abc", min_size=1, max_size=3),
    st.recursive(
        _LEAVES, lambda c: st.one_of(st.dictionaries(st.integers(0, 9), c, max_size=3), st.lists(c, max_size=3))
    ),
    max_size=4,
)


def with_tensors(value: Any) -> Any:
    if isinstance(value, tuple):
        return torch.rand(value[0]).to(getattr(torch, value[1]))
    if isinstance(value, dict):
        return {k: with_tensors(v) for k, v in value.items()}
    return [with_tensors(v) for v in value] if isinstance(value, list) else value


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(state=_STATES, num_parts=st.integers(1, 4), segment_bytes=st.integers(20, 2000))
def test_any_nested_state_round_trips(tmp_path: Path, state: Any, num_parts: int, segment_bytes: int) -> None:
    state = with_tensors(state)
    directory = tmp_path / "run"
    info = save(directory, state, num_parts=num_parts, num_files=num_parts, segment_bytes=segment_bytes, fsync=False)
    assert verify_checkpoint(info.path).ok
    assert same(load(info), state)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # what stock torch says without a process group
def test_stock_readers_read_slices_and_the_whole(run_dir: Path, tmp_path: Path) -> None:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    state = {
        "empty": torch.empty(3, 0),
        "scalar": torch.tensor(2.5),
        "nested": {"list": [torch.arange(5), {"k": torch.ones(2, 2).t()}], "flag": True},
        "tied": torch.arange(6),
    }
    state["same"] = state["tied"]
    info = save(run_dir, state, num_parts=3, num_files=2, segment_bytes=100)
    for item in read_checkpoint(str(run_dir), 1)[1].layout.items:  # a blob is a file of its own
        spec = read_checkpoint(str(run_dir), 1)[1].layout.files[item.file]
        blob = (Path(info.path) / spec.name).read_bytes()[item.offset : item.offset + item.nbytes]
        torch.load(io.BytesIO(blob), weights_only=True)
    target = {
        "empty": torch.zeros(3, 0),
        "scalar": torch.tensor(0.0),
        "nested": {"list": [torch.zeros(5, dtype=torch.int64), {"k": torch.zeros(2, 2)}], "flag": False},
        "tied": torch.zeros(6, dtype=torch.int64),
        "same": torch.zeros(6, dtype=torch.int64),
    }
    dcp.load(target, checkpoint_id=info.path, no_dist=True)
    assert same(target, state)
    dcp_to_torch_save(info.path, tmp_path / "out.pt")
    assert same(torch.load(tmp_path / "out.pt", weights_only=True), state)


def test_tied_weights_share_an_item_and_other_views_do_not(run_dir: Path) -> None:
    weight = torch.randn(4, 4)
    state = {"a": weight, "b": weight, "t": weight.t(), "row": weight[1]}
    info = save(run_dir, state)
    assert info.num_tensors == 3
    loaded = load(info)
    assert (
        loaded["a"] is loaded["b"] and bits(loaded["t"]) == bits(weight.t()) and bits(loaded["row"]) == bits(weight[1])
    )


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # what stock torch says without a process group
def test_index_names_no_process_local_path_that_a_copy_would_break(run_dir: Path, tmp_path: Path) -> None:
    """A checkpoint that is moved is read all the same."""
    info = save(run_dir, {"x": torch.arange(9)})
    moved = tmp_path / "elsewhere"
    Path(info.path).rename(moved)
    target = {"x": torch.zeros(9, dtype=torch.int64)}
    dcp.load(target, checkpoint_id=moved, no_dist=True)
    assert same(target, {"x": torch.arange(9)})
    assert verify_checkpoint(moved).ok


def test_a_part_that_is_run_again_changes_nothing(run_dir: Path) -> None:
    run_dir.mkdir()
    job = make_task(run_dir, num_parts=2)
    first = persist_part(job, 0)
    again = persist_part(job, 0)
    assert (first.pid, first.started, first.written) == (again.pid, again.started, again.written)
    committed = persist_part(job, 1).committed
    assert committed is not None
    assert persist_part(job, 0).committed is not None  # it learns what the other one did
    assert persist_part(job, 1).committed is not None
    assert not partial_names(str(run_dir))
    assert run(make_task(run_dir, step=2)).info.step == 2
