"""torch_checkpointing with stager's staging and storage, whoever is killed. docs/integrations/torch_checkpointing.md."""

from __future__ import annotations

import gc
import io
import logging
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

from stager import (
    ArgumentError,
    ClosedError,
    ConfigError,
    CorruptCheckpointError,
    PathCheckpointer,
    StorageError,
    UnstageableError,
    load_checkpoint,
    verify,
)
from stager.workers.checkpoint.directory.run_directory import list_checkpoints
from tests import cuda_runtime
from tests.faults import Faults
from tests.integrations.training import Training, final, page_script, resumes_bit_equal
from tests.staging.ranks import run_ranks
from tests.states import same

pytest.importorskip("torch_checkpointing", reason="pip install 'stager[torch-checkpointing]'")

from torch_checkpointing import CheckpointManager, CheckpointStagerConfig, CheckpointWriterConfig, ItemSpec
from torch_checkpointing.checkpoint_layout import (  # after importorskip
    JsonSerialization,
    LayoutInfo,
    RawSerialization,
    SafetensorsSerialization,
)
from torch_checkpointing.default_resharder import DefaultResharder
from torch_checkpointing.logging_utils import checkpoint_logging_context
from torch_checkpointing.storage.base_storage import ReadArgs
from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

from stager.integrations.torch_checkpointing import (
    StagerCheckpointManager,
    StagerCheckpointStager,
    StagerStorageConfig,
)
from stager.integrations.torch_checkpointing_parts import commit, write_stream
from stager.integrations.torch_checkpointing_parts.read_stream import HashedFile, ReadStream
from stager.integrations.torch_checkpointing_parts.write_stream import SegmentHasher
from tests.integrations.torch_checkpointing_bodies import WHOLE, new_manager, note

BODIES = "tests.integrations.torch_checkpointing_bodies"
PLAIN = {"use_pinned_memory": False, "use_non_blocking_copy": False}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# -- the stager -------------------------------------------------------------------------------------------------------


def new_stager(use_async_staging: bool, **options: Any) -> StagerCheckpointStager:
    return StagerCheckpointStager(CheckpointStagerConfig(use_async_staging=use_async_staging, **PLAIN), **options)


def staged(result: Any, use_async_staging: bool) -> Any:
    assert isinstance(result, Future) is use_async_staging
    return result.result() if use_async_staging else result


ways = pytest.mark.parametrize("use_async_staging", [False, True])


@ways
def test_a_staged_payload_is_a_copy_and_keys_that_need_none_are_passed_on(use_async_staging: bool) -> None:
    stager = new_stager(use_async_staging)
    payload: dict[str, Any] = {
        "copied": torch.arange(4.0),
        "passed": torch.ones(4),
        "nested": {"step": [1, (2.0, "three")]},
    }
    result = staged(stager.stage(payload, {"passed", "missing"}), use_async_staging)
    assert type(result) is dict and result.keys() == payload.keys()
    assert result["passed"] is payload["passed"]
    assert result["copied"].is_shared()
    payload["copied"].zero_()
    payload["nested"]["step"].clear()
    assert result["copied"].tolist() == [0, 1, 2, 3] and result["nested"] == {"step": [1, (2.0, "three")]}
    assert staged(stager.stage([torch.ones(2)]), use_async_staging)[0].tolist() == [1, 1]
    stager.close()


@ways
def test_the_last_result_is_kept_and_none_after_a_failure(use_async_staging: bool) -> None:
    stager = new_stager(use_async_staging)
    assert stager.get_staged_state_dict() is None
    results = [staged(stager.stage({"weight": torch.full((3,), value)}), use_async_staging) for value in (1.0, 2.0)]
    assert stager.get_staged_state_dict() is results[1] is not results[0]
    assert results[1]["weight"].tolist() == [2, 2, 2]
    with pytest.raises(UnstageableError, match=r"\['lock'\]|lock"):
        staged(stager.stage({"lock": _Uncopyable()}), use_async_staging)
    assert stager.get_staged_state_dict() is None
    stager.close()


class _Uncopyable:
    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("this cannot be copied")


def test_new_tensors_of_the_same_sizes_get_the_buffers_of_the_last_result() -> None:
    stager = new_stager(False)
    places = [stager.stage({"a": torch.rand(5000), "b": torch.rand(7)})["a"].data_ptr() for _ in range(4)]
    assert len(set(places)) == 1
    stager.close()


def test_small_tensors_take_no_descriptor_each() -> None:
    stager = new_stager(False)
    before = len(os.listdir("/proc/self/fd"))
    result = stager.stage({str(number): torch.full((100,), float(number)) for number in range(500)})
    assert len(os.listdir("/proc/self/fd")) <= before + 4
    assert all(value.is_shared() and value.eq(int(name)).all() for name, value in result.items())
    stager.close()


def test_stagers_share_an_executor_of_the_caller_who_closes_it() -> None:
    with ThreadPoolExecutor(1) as executor:
        stagers = [new_stager(True, staging_executor=executor) for _ in range(2)]
        results = [stager.stage({"value": torch.tensor(number)}) for number, stager in enumerate(stagers)]
        assert [result.result()["value"].item() for result in results] == [0, 1]
        for stager in stagers:
            stager.close()
        assert executor.submit(lambda: "still runs").result() == "still runs"


@ways
def test_a_closed_stager_stages_no_more_and_its_results_stay(use_async_staging: bool) -> None:
    stager = new_stager(use_async_staging)
    result = staged(stager.stage({"weight": torch.ones(3)}), use_async_staging)
    stager.close()
    stager.close()
    assert result["weight"].tolist() == [1, 1, 1] and stager.pinned_num_bytes() == 0
    with pytest.raises(ClosedError, match=r"stage\(\) was called after close\(\)"):
        stager.stage({})


class _Runtime:
    """A CUDA runtime that takes everything."""

    def __init__(self) -> None:
        self.registered: set[int] = set()

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        self.registered.add(address)
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        self.registered.discard(address)
        return 0


def test_page_locked_memory_is_counted_and_freed_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = _Runtime()
    cuda_runtime.install(monkeypatch, runtime)
    stager = StagerCheckpointStager(CheckpointStagerConfig(use_pinned_memory=True, use_non_blocking_copy=False))
    for _ in range(3):
        stager.stage({"weight": torch.ones(1000), "step": 1}).result()
        assert stager.pinned_num_bytes() == 4000 and len(runtime.registered) == 1
    stager.close()
    gc.collect()
    assert stager.pinned_num_bytes() == 0 and not runtime.registered


def test_closing_waits_for_what_the_callers_executor_stages(faults: Faults) -> None:
    hold = faults.hold("save.copied")
    with ThreadPoolExecutor(2) as executor, hold:
        stager = new_stager(True, staging_executor=executor)
        result = stager.stage({"weight": torch.ones(3)})
        hold.wait()
        closing = executor.submit(stager.close)
        assert not result.done() and not closing.done()
        hold.release()
        assert result.result()["weight"].tolist() == [1, 1, 1]
        closing.result()


def test_the_defaults_are_those_of_torch_checkpointing() -> None:
    stager = StagerCheckpointStager()
    result = stager.stage({"weight": torch.ones(2)})
    assert isinstance(result, Future) and result.result()["weight"].is_shared()
    stager.close()


def test_what_cannot_be_meant_is_refused() -> None:
    with ThreadPoolExecutor(1) as executor, pytest.raises(ArgumentError, match="use_async_staging is False") as raised:
        new_stager(False, staging_executor=executor)
    assert isinstance(raised.value, ValueError)  # as theirs
    with pytest.raises(ArgumentError, match=r"config must be .*CheckpointStagerConfig, got a dict"):
        StagerCheckpointStager({"a": 1})


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_copies_that_cannot_be_queued_are_refused_as_by_torch_checkpointing() -> None:
    with pytest.raises(AssertionError, match="needs an accelerator"):
        StagerCheckpointStager(CheckpointStagerConfig(use_pinned_memory=False, use_non_blocking_copy=True))


def test_metrics_have_the_names_and_the_context_of_torch_checkpointing(caplog: pytest.LogCaptureFixture) -> None:
    checkpoint_logging_context.update(step=7)
    with caplog.at_level(logging.INFO, "torch_checkpointing"):
        stager = StagerCheckpointStager(CheckpointStagerConfig(metric_prefix="mine", **PLAIN))
        stager.stage({"weight": torch.ones(2)}).result()
        stager.close()
    checkpoint_logging_context.update(step=None)
    records = [vars(record) for record in caplog.records]
    said = {record["metric_name"]: record["step"] for record in records if record.get("metric_name")}
    assert said == {
        f"mine.{name}.latency_ms": 7
        for name in (
            "staging.initialize_stream",
            "staging.e2e",
            "execute.subprocess_comm.wait_for_tensor_copy",
        )
    }


# -- the storage ------------------------------------------------------------------------------------------------------


def payload(value: float = 1.0) -> dict[str, Any]:
    weights = {"first": torch.full((50, 40), value), "second": torch.arange(10.0)}
    return {"model": weights, "optimizer": {"moments": [torch.ones(3), torch.full((2,), value)]}, "step": 3}


ITEMS = dict.fromkeys(payload())


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def stock_manager() -> CheckpointManager:
    config = CheckpointManager.Config.with_sync_save()
    config.storage_config = LocalFileSystemStorageConfig(use_direct_io=False)
    return config.build()


def test_a_checkpoint_is_one_of_stager_and_loads_by_torch_checkpointing(tmp_path: Path) -> None:
    manager = new_manager()
    manager.save(str(tmp_path / "step-3"), payload())
    assert os.listdir(tmp_path) == ["step-3"]
    assert verify(tmp_path / "step-3", strict=True).ok
    (found,), skipped = list_checkpoints(tmp_path)
    assert (found.step, found.format, found.num_objects, skipped) == (3, "torch_checkpointing", 3, [])
    assert same(dict(manager.load(tmp_path / "step-3", into=ITEMS)), payload())
    state = load_checkpoint(tmp_path / "step-3").state
    assert same(state, {f"{name}_0": value for name, value in payload().items()})
    manager.close()


def test_parts_are_loaded_and_targets_filled_in_place(tmp_path: Path) -> None:
    manager = new_manager()
    manager.save(str(tmp_path / "step-3"), payload())
    target = torch.zeros(50, 40)
    loaded = manager.load(tmp_path / "step-3", into={"model": {"first": target}})
    assert loaded["model"].keys() == {"first"} and loaded["model"]["first"] is target
    assert torch.equal(target, payload()["model"]["first"])
    with pytest.raises(RuntimeError, match="is missing keys"):
        manager.load(tmp_path / "step-3", into={"model": {"third": target}}, strict=True)
    with pytest.raises(FileNotFoundError, match="scheduler_0"):
        manager.load(tmp_path / "step-3", into={"scheduler": None})
    manager.close()


@pytest.mark.parametrize("use_mmap", [True, False])
def test_with_and_without_stager_each_loads_what_the_other_wrote(tmp_path: Path, use_mmap: bool) -> None:
    ours, theirs = new_manager(), stock_manager()
    ours._reader._disable_use_mmap_backed_storage_on_load = not use_mmap
    ours.save(str(tmp_path / "ours"), payload())
    theirs.save(str(tmp_path / "theirs"), payload())
    for name in ("model_0.pt", "optimizer_0.pt", "step_0.pt"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    for manager, name in ((ours, "theirs"), (theirs, "ours"), (ours, "ours")):
        assert same(dict(manager.load(tmp_path / name, into=ITEMS)), payload())
    ours.close()
    theirs.close()


@pytest.mark.parametrize("use_mmap", [True, False])
def test_damage_is_found_by_whoever_loads(tmp_path: Path, use_mmap: bool) -> None:
    manager = new_manager()
    manager._reader._disable_use_mmap_backed_storage_on_load = not use_mmap
    manager.save(str(tmp_path / "step-3"), payload())
    flip_a_byte(tmp_path / "step-3" / "model_0.pt")
    assert "model_0.pt" in verify(tmp_path / "step-3").problems[0]
    with pytest.raises(CorruptCheckpointError, match=r"model_0\.pt: is damaged: bytes 0 to \d+ do not match"):
        manager.load(tmp_path / "step-3", into={"model": None})
    assert manager.load(tmp_path / "step-3", into={"step": None}) == {"step": 3}
    trusting = new_manager(storage_config=StagerStorageConfig(verify=False))
    assert trusting.load(tmp_path / "step-3", into={"model": None})["model"].keys() == payload()["model"].keys()
    (tmp_path / "step-3" / "step_0.pt").write_bytes(b"")
    with pytest.raises(CorruptCheckpointError, match=r"step_0\.pt: is 0 bytes long"):
        manager.load(tmp_path / "step-3", into={"step": None})
    (tmp_path / "step-3" / "manifest.json").write_bytes(b'{"xxh3_128":"')
    with pytest.raises(CorruptCheckpointError, match=r"manifest\.json"):
        manager.load(tmp_path / "step-3", into={"optimizer": None})
    manager.close()
    trusting.close()


@pytest.mark.parametrize("use_mmap", [True, False])
@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:1],
        lambda data: data[:12],
        lambda data: data[: len(data) // 2],
        lambda data: bytes(len(data)),
        lambda data: b"X" + data[1:],
        lambda data: data.replace(b'"xxh3_128"', b'"xxh3_129"', 1),  # still JSON
        lambda data: data.replace(b'"body"', b'"bodx"', 1),
        lambda data: b"\xff" * len(data),
    ],
    ids=[
        "empty",
        "1 byte",
        "12 bytes",
        "half",
        "zeros",
        "first byte",
        "name of the hash",
        "name of the body",
        "no text",
    ],
)
def test_a_damaged_manifest_does_not_turn_off_the_comparison(
    tmp_path: Path, damage: Callable[[bytes], bytes], use_mmap: bool
) -> None:
    manager = new_manager()
    manager._reader._disable_use_mmap_backed_storage_on_load = not use_mmap
    manager.save(str(tmp_path / "step-3"), payload())
    manifest = tmp_path / "step-3" / "manifest.json"
    manifest.write_bytes(damage(manifest.read_bytes()))
    with pytest.raises(CorruptCheckpointError, match=r"manifest\.json: is damaged"):
        manager.load(tmp_path / "step-3", into={"model": None})
    trusting = new_manager(storage_config=StagerStorageConfig(verify=False))  # as the message says
    assert same(dict(trusting.load(tmp_path / "step-3", into=ITEMS)), payload())
    manager.close()
    trusting.close()


@pytest.mark.parametrize("text", ["{}", '{"name": "a web page"}', "[]"])
def test_a_manifest_of_another_program_beside_its_checkpoint_is_left_to_it(tmp_path: Path, text: str) -> None:
    theirs, ours = stock_manager(), new_manager()
    theirs.save(str(tmp_path / "step-3"), payload())
    (tmp_path / "step-3" / "manifest.json").write_text(text)
    assert same(dict(ours.load(tmp_path / "step-3", into=ITEMS)), payload())
    ours.close()
    theirs.close()


def test_a_save_to_a_path_that_is_taken_raises_and_changes_nothing(tmp_path: Path) -> None:
    manager = new_manager()
    manager.save(str(tmp_path / "step-3"), payload())
    with pytest.raises(OSError, match="a commit replaces nothing"):
        manager.save(str(tmp_path / "step-3"), payload(2.0))
    assert same(dict(manager.load(tmp_path / "step-3", into=ITEMS)), payload())
    assert verify(tmp_path / "step-3").ok
    manager.close()


POINTS = ["part.begin", "part.write", "part.written", "part.synced", "part.receipt"]
POINTS += ["commit.begin", "commit.indexed", "commit.manifest"]


@pytest.mark.parametrize("point", POINTS)
def test_a_save_that_fails_leaves_no_checkpoint_and_the_next_one_is_whole(
    tmp_path: Path, faults: Faults, point: str
) -> None:
    failing, manager = (new_manager(storage_config=of_run(run)) for run in ("0123abcd", "4567abcd"))
    faults.arm(point, "errno ENOSPC")
    with pytest.raises(OSError, match="No space left"):
        failing.save(str(tmp_path / "step-3"), {**payload(), "given_up": 1})
    assert faults.fired(point) and not (tmp_path / "step-3").exists()
    assert list_checkpoints(tmp_path) == ([], [])
    manager.save(str(tmp_path / "step-3"), payload(2.0))
    assert {path.name for path in tmp_path.glob("*step*")} == {"step-3"}
    assert set(os.listdir(tmp_path / "step-3")) == {"manifest.json", "model_0.pt", "optimizer_0.pt", "step_0.pt"}
    assert verify(tmp_path / "step-3", strict=True).ok
    assert same(dict(manager.load(tmp_path / "step-3", into=ITEMS)), payload(2.0))
    failing.close()
    manager.close()


WAYS_TO_FAIL = ["callback", "part.receipt", "part.synced", "commit.begin", "commit.indexed", "commit.manifest"]


@pytest.mark.parametrize("run", ["", "0123abcd"], ids=["without a process group", "with one"])
@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("same_manager", [True, False])
@pytest.mark.parametrize("way", WAYS_TO_FAIL)
def test_files_of_a_save_that_failed_are_no_part_of_the_next_one(
    tmp_path: Path, faults: Faults, run: str, num_threads: int, same_manager: bool, way: str
) -> None:
    """1. A save of four items fails. 2. The next save goes to the same name, and has one item less."""
    failures = ["callback"] if way == "callback" else []

    def callback(args: Any) -> None:
        args.storage.write(Path(args.path, "of_the_callback.txt"), b"mine")
        if failures:
            raise OSError(failures.pop())

    def manager_of_this_training() -> StagerCheckpointManager:
        config = StagerCheckpointManager.Config.with_sync_save()
        config.save.writer_config.file_write_max_threads = num_threads
        config.storage_config, config.pre_finalize_callback = of_run(run) if run else StagerStorageConfig(), callback
        return StagerCheckpointManager(config)

    if way != "callback":
        after = (
            1 if way.startswith("part.") and not same_manager else 0
        )  # the second file, or the first: the item itself
        faults.arm(way, f"errno ENOSPC after={after}")
    manager = manager_of_this_training()
    with pytest.raises(OSError, match=r"callback|No space left"):
        manager.save(str(tmp_path / "last"), {"ema": {"weight": torch.zeros(3)}, **payload()})
    if not same_manager:
        manager.close()
        manager = manager_of_this_training()
    manager.save(str(tmp_path / "last"), payload(2.0))
    names = {"manifest.json", "model_0.pt", "optimizer_0.pt", "step_0.pt", "of_the_callback.txt"}
    assert set(os.listdir(tmp_path / "last")) == names and set(os.listdir(tmp_path)) <= {"last", "faults"}
    assert verify(tmp_path / "last", strict=True).ok
    assert same(dict(manager.load(tmp_path / "last", into=ITEMS)), payload(2.0))
    manager.close()


def test_a_callback_that_makes_the_directory_again_loses_nothing(tmp_path: Path) -> None:
    def callback(args: Any) -> None:
        args.storage.mkdir(Path(args.path))
        args.storage.write(Path(args.path, "of_the_callback.txt"), b"mine")

    manager = new_manager(pre_finalize_callback=callback)
    for step in (1, 2):
        manager.save(str(tmp_path / f"step-{step}"), payload())
        names = {"manifest.json", "model_0.pt", "optimizer_0.pt", "step_0.pt", "of_the_callback.txt"}
        assert set(os.listdir(tmp_path / f"step-{step}")) == names
    manager.close()


def test_a_configuration_that_several_ranks_got_from_their_parent_makes_them_no_one_writer() -> None:
    of_the_parent = StagerStorageConfig()
    of_the_parent._writer = "0123abcd"
    assert pickle.loads(pickle.dumps(of_the_parent)).writer() == StagerStorageConfig().writer() != "0123abcd"


def test_a_save_that_begins_removes_only_what_its_own_process_has_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another rank may have written its part already; and what somebody has written since is not what was left."""
    config, other = of_run("0123abcd"), of_run("0123abcd")
    monkeypatch.setattr(other, "writer", lambda: "4567abcd")
    for storage, names in ((config.create_storage(), "abc"), (other.create_storage(), "xy")):
        with ThreadPoolExecutor(1, thread_name_prefix="ckpt-write") as executor:
            executor.submit(storage.mkdir, tmp_path / "tmp_step-1").result()
        for name in names:
            storage.write(tmp_path / "tmp_step-1" / name, name.encode())
    other.create_storage().write(tmp_path / "tmp_step-1" / "a", b"another rank's")
    (tmp_path / "tmp_step-1" / "b").write_bytes(b"a callback's")
    begun = config.create_storage()
    with ThreadPoolExecutor(1, thread_name_prefix="ckpt-write") as executor:
        executor.submit(begun.mkdir, tmp_path / "tmp_step-1").result()
    assert sorted(begun.ls(tmp_path / "tmp_step-1")) == ["a", "b", "x", "y"]


def test_ranks_remove_what_each_has_left_of_a_save_that_failed(tmp_path: Path) -> None:
    assert run_ranks(f"{BODIES}:failed_and_saved", 2, tmp_path, str(tmp_path / "out")) == ["OSError", "OSError"]
    names = {"manifest.json", "model_0.pt", "model_1.pt"}
    assert set(os.listdir(tmp_path / "out" / "last")) == names
    assert verify(tmp_path / "out" / "last", strict=True).ok


@pytest.mark.long
def test_after_an_asynchronous_save_that_failed_a_new_manager_saves(tmp_path: Path, faults: Faults) -> None:
    faults.arm("commit.indexed", "errno ENOSPC")
    command = [sys.executable, "-m", BODIES, "retry", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert set(os.listdir(tmp_path / "out" / "last")) == {"manifest.json", "model_0.pt"}
    assert load_checkpoint(tmp_path / "out" / "last").state["model_0"]["weight"].tolist() == [2, 2, 2]


def of_run(run: str) -> StagerStorageConfig:
    """The configuration of a training with a process group."""
    config = StagerStorageConfig()
    config._run = run
    return config


def test_files_of_a_killed_training_are_no_part_of_the_checkpoint(tmp_path: Path) -> None:
    """It had two ranks, and the one that resumes has one."""
    storage = of_run("0123abcd").create_storage()
    storage.mkdir(tmp_path / "tmp_step-3")
    for name in ("model_0.pt", "model_1.pt"):
        content = io.BytesIO()
        torch.save({"weight": torch.zeros(3)}, content)
        storage.write(tmp_path / "tmp_step-3" / name, content.getvalue())
    (tmp_path / "tmp_step-3" / ".optimizer_1.pt.stager-unfinished-0123456789abcdef").write_bytes(b"half")
    assert sorted(storage.ls(tmp_path / "tmp_step-3")) == ["model_0.pt", "model_1.pt"]
    manager = new_manager()
    manager.save(str(tmp_path / "step-3"), payload())
    names = {"manifest.json", "model_0.pt", "optimizer_0.pt", "step_0.pt"}
    assert set(os.listdir(tmp_path / "step-3")) == names
    assert same(dict(manager.load(tmp_path / "step-3", into=ITEMS)), payload())
    manager.close()


def test_a_directory_of_another_training_is_committed_and_renamed_as_it_is(tmp_path: Path) -> None:
    """By a program that has written none of its files: nothing is taken for what was left."""
    writer, other = of_run("0123abcd").create_storage(), StagerStorageConfig().create_storage()
    writer.mkdir(tmp_path / "tmp")
    for name in ("a", "b"):
        writer.write(tmp_path / "tmp" / name, name.encode())
    other.rename(tmp_path / "tmp", tmp_path / "step-1", is_directory=True)
    writer.rename(tmp_path / "step-1", tmp_path / "step-2", is_directory=True)
    assert set(os.listdir(tmp_path / "step-2")) == {"a", "b", "manifest.json"}
    assert verify(tmp_path / "step-2", strict=True).ok
    assert [one.step for one in list_checkpoints(tmp_path)[0]] == [2]


def test_files_that_a_callback_writes_past_the_storage_are_hashed_by_the_commit(tmp_path: Path) -> None:
    def change(args: Any) -> None:
        note(args)
        with open(f"{args.path}/step_0.pt", "ab") as file:
            file.write(b"more")

    manager = new_manager(pre_finalize_callback=change)
    manager.save(str(tmp_path / "step-3"), payload())
    loaded = load_checkpoint(tmp_path / "step-3", keys="model_0")
    assert verify(tmp_path / "step-3", strict=True).ok and loaded.files["note.txt"] == b"mine"
    flip_a_byte(tmp_path / "step-3" / "note.txt")
    assert "note.txt" in verify(tmp_path / "step-3").problems[0]
    manager.close()


@pytest.mark.parametrize("sidecar_bytes", [commit._SIDECAR_BYTES, 0])
def test_other_formats_are_hashed_and_removed_with_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sidecar_bytes: int
) -> None:
    pytest.importorskip("safetensors")
    monkeypatch.setattr(commit, "_SIDECAR_BYTES", sidecar_bytes)
    layouts = {
        "config": LayoutInfo("config_{rank}.json", JsonSerialization()),
        "raw": LayoutInfo("raw.bin", RawSerialization()),
        "weights": LayoutInfo("weights.safetensors", SafetensorsSerialization()),
    }
    manager = new_manager(items={name: ItemSpec(layout=layout, required=False) for name, layout in layouts.items()})
    values = {"config": {"lr": 0.1}, "raw": b"bytes", "weights": {"weight": torch.ones(3)}, "step": 3}
    manager.save(str(tmp_path / "step-3"), values)
    assert same(dict(manager.load(tmp_path / "step-3", into=dict.fromkeys(values))), values)
    assert verify(tmp_path / "step-3", strict=True).ok
    loaded = load_checkpoint(tmp_path / "step-3")
    assert loaded.state == {"step_0": 3}
    assert set(loaded.files) == ({"config_0.json", "raw.bin", "weights.safetensors"} if sidecar_bytes else set())
    flip_a_byte(tmp_path / "step-3" / "raw.bin")
    assert "raw.bin" in verify(tmp_path / "step-3").problems[0]
    with pytest.raises(CorruptCheckpointError, match=r"raw\.bin: is damaged"):
        manager.load(tmp_path / "step-3", into={"raw": None})
    manager.close()
    with PathCheckpointer({"workers": {"count": 1}}) as checkpointer:
        checkpointer.delete(tmp_path / "step-3")
    assert [name for name in os.listdir(tmp_path) if not name.startswith(".")] == []


RENAMES = {  # what is there before: source, destination
    "a directory onto nothing": ("directory", None),
    "a directory onto an empty one": ("directory", "empty"),
    "a directory onto a populated one": ("directory", "directory"),
    "a directory onto a file": ("directory", "file"),
    "a file onto nothing": ("file", None),
    "a file onto a file": ("file", "file"),
    "a file onto an empty directory": ("file", "empty"),
    "a file onto a directory": ("file", "directory"),
}


def put(storage: Any, path: Path, kind: str | None, content: bytes) -> None:
    if kind == "file":
        storage.write(path, content)
    elif kind is not None:
        storage.mkdir(path)
        if kind == "directory":
            storage.write(path / "inside", content)


@pytest.mark.parametrize(("source", "final"), RENAMES.values(), ids=list(RENAMES))
def test_rename_does_what_torch_checkpointing_s_own_storage_does(
    tmp_path: Path, source: str, final: str | None
) -> None:
    outcomes = []
    for config in (StagerStorageConfig(), LocalFileSystemStorageConfig(use_direct_io=False)):
        where = tmp_path / type(config).__name__
        storage = config.create_storage()
        storage.mkdir(where)
        put(storage, where / "source", source, b"new")
        put(storage, where / "final", final, b"old")
        try:
            storage.rename(where / "source", where / "final")
            is_error = False
        except OSError:
            is_error = True
        there = {str(path.relative_to(where)): path.read_bytes() for path in where.rglob("*") if path.is_file()}
        visible = {name: data for name, data in there.items() if ".stager-" not in name and "manifest" not in name}
        outcomes.append((is_error, visible))
    assert outcomes[0] == outcomes[1]


def test_a_renamed_or_removed_file_takes_its_receipt_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = StagerStorageConfig().create_storage()
    storage.mkdir(tmp_path / "tmp")
    for name in ("a", "b", "c"):
        storage.write(tmp_path / "tmp" / name, name.encode())
    storage.rename(tmp_path / "tmp" / "a", tmp_path / "tmp" / "b")
    storage.delete(tmp_path / "tmp" / "c")
    assert storage.read(tmp_path / "tmp" / "b") == b"a" and storage.ls(tmp_path / "tmp") == ["b"]
    monkeypatch.setattr(commit, "hash_file", lambda *_: pytest.fail("there is a receipt"))
    storage.rename(tmp_path / "tmp", tmp_path / "step-1", is_directory=True)
    assert sorted(os.listdir(tmp_path / "step-1")) == ["b", "manifest.json"] and verify(tmp_path / "step-1").ok


def test_a_file_is_there_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    storage = StagerStorageConfig().create_storage()
    storage.write(tmp_path / "file", b"old")
    with pytest.raises(ZeroDivisionError), storage.stream_write(tmp_path / "file") as stream:
        stream.write(b"new")
        assert (tmp_path / "file").read_bytes() == b"old"
        1 / 0  # noqa: B018
    assert (tmp_path / "file").read_bytes() == b"old" and storage.ls(tmp_path) == ["file"]
    assert not [name for name in os.listdir(tmp_path) if "unfinished" in name]
    with pytest.raises(StorageError, match="does not exist"):
        storage.write(tmp_path / "missing" / "file", b"new")


def test_a_file_whose_receipt_cannot_be_written_does_not_appear(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a receipt it would be taken for a file that a callback has written past the storage."""
    storage = StagerStorageConfig().create_storage()

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(write_stream.files, "write_atomically", fail)
        with pytest.raises(StorageError, match="No space left"):
            storage.write(tmp_path / "file", b"new")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("segment_bytes", [1, 7, 64, 1000])
def test_a_stream_reads_what_the_file_has_wherever_one_begins(tmp_path: Path, segment_bytes: int) -> None:
    data = random.Random(0).randbytes(500)
    path = tmp_path / "file"
    path.write_bytes(data)
    pieces = [data[start : start + segment_bytes] for start in range(0, len(data), segment_bytes)]
    hashes = tuple(xxhash.xxh3_128_hexdigest(piece) for piece in pieces)
    plain = io.BytesIO(data)
    chosen = random.Random(1)
    with ReadStream(str(path), HashedFile(len(data), segment_bytes, hashes)) as stream:
        assert stream.readable() and stream.seekable() and stream.read() == data
        for _ in range(200):
            offset, whence = chosen.choice([(chosen.randrange(600), 0), (-chosen.randrange(500), 2), (3, 1)])
            assert stream.seek(offset, whence) == plain.seek(offset, whence) == stream.tell()
            count = chosen.choice([0, 1, 63, 64, 65, 500])
            assert stream.read(count) == plain.read(count)
        with pytest.raises(ValueError, match="no position -1"):
            stream.seek(-1)


@pytest.mark.parametrize("nbytes", [0, 1, 15, 16, 17, 32, 33])
def test_each_segment_has_one_hash(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    monkeypatch.setattr(write_stream, "SEGMENT_BYTES", 16)
    hasher, data = SegmentHasher(), bytes(range(nbytes))
    for start in range(0, nbytes, 5):
        hasher.add(memoryview(data[start : start + 5]))
    receipt = hasher.receipt(0, "")
    pieces = [data[start : start + 16] for start in range(0, max(1, nbytes), 16)]
    assert receipt.hashes == tuple(xxhash.xxh3_128_hexdigest(piece) for piece in pieces)
    assert (receipt.nbytes, receipt.whole) == (nbytes, xxhash.xxh3_128_hexdigest(data))


def test_a_slice_is_read_and_checked_without_the_rest(tmp_path: Path) -> None:
    storage = StagerStorageConfig().create_storage()
    storage.mkdir(tmp_path / "tmp")
    data = bytes(100) + b"here" + bytes(20 << 20) + b"there"
    storage.write(tmp_path / "tmp" / "file", data)
    (tmp_path / "tmp" / "file").rename(tmp_path / "tmp" / "large")
    storage.rename(tmp_path / "tmp", tmp_path / "step-1", is_directory=True)
    with open(tmp_path / "step-1" / "large", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"X")
    with storage.stream_read(tmp_path / "step-1" / "large", ReadArgs(pre_read_full_file=False)) as stream:
        stream.seek(100)
        assert stream.read(4) == b"here"
        stream.seek(-5, 2)
        with pytest.raises(CorruptCheckpointError, match="bytes 16777216 to"):
            stream.read(5)


def test_what_cannot_be_a_checkpoint_is_refused(tmp_path: Path) -> None:
    storage = StagerStorageConfig().create_storage()
    with pytest.raises(ArgumentError, match=r"has its manifest\.json"):
        storage.stream_write(tmp_path / "manifest.json")
    storage.mkdir(tmp_path / "tmp" / "below")
    with pytest.raises(StorageError, match=r"no checkpoint can have the name '\.hidden'"):
        storage.rename(tmp_path / "tmp", tmp_path / ".hidden", is_directory=True)
    with pytest.raises(StorageError, match="has no directories in it"):
        storage.rename(tmp_path / "tmp", tmp_path / "step-1", is_directory=True)
    assert os.listdir(tmp_path) == ["tmp"]


# -- the manager ------------------------------------------------------------------------------------------------------


def in_a_directory(config: Any) -> None:
    config.items = {"model": ItemSpec(layout=LayoutInfo("model/{rank}.pt", RawSerialization()))}


def without_a_barrier(config: Any) -> None:
    with pytest.warns(UserWarning, match="requires `write_to_temp_dir=False`"):
        config.save.writer_config = CheckpointWriterConfig(barrier_config=None)


def in_place(config: Any) -> None:
    config.save.writer_config = CheckpointWriterConfig(write_to_temp_dir=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (in_a_directory, "model has file_path='model/"),
        (in_place, "write_to_temp_dir=False"),
        (without_a_barrier, "has barrier_config=None, and without a barrier"),
    ],
)
def test_a_manager_refuses_what_its_storage_could_not_commit(
    tmp_path: Path, change: Callable[[Any], None], message: str
) -> None:
    config = StagerCheckpointManager.Config.with_sync_save()
    change(config)
    with pytest.raises(ConfigError, match=message):
        config.build()
    config.storage_config = LocalFileSystemStorageConfig(use_direct_io=False)  # as the message says
    config.build().close()


def test_an_asynchronous_save_is_staged_by_stager_and_committed_by_the_subprocess(
    tmp_path: Path, faults: Faults
) -> None:
    """In a process of its own, as torch_checkpointing leaves threads behind."""
    hold = faults.hold("commit.begin")
    command = [sys.executable, "-m", BODIES, str(tmp_path / "out")]
    with hold, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        hold.wait()
        assert os.listdir(tmp_path / "out") == ["tmp_step-3"]
        hold.release()
        said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert verify(tmp_path / "out" / "step-3", strict=True).ok
    assert load_checkpoint(tmp_path / "out" / "step-3").state["frozen_0"].tolist() == [1, 1, 1]


def test_ranks_commit_one_checkpoint(tmp_path: Path) -> None:
    results = run_ranks(f"{BODIES}:saved_and_loaded", 2, tmp_path, str(tmp_path / "out"))
    assert results[0] == results[1] and len(results[0]) == 32
    names = {"manifest.json", "model_0.pt", "model_1.pt", "own_0.pt", "own_1.pt"}
    assert set(os.listdir(tmp_path / "out" / "step-1")) == names
    assert verify(tmp_path / "out" / "step-1", strict=True).ok


def test_ranks_load_shards_of_what_one_process_saved(tmp_path: Path) -> None:
    manager = new_manager(items={"model": ItemSpec(resharder=DefaultResharder())})
    manager.save(str(tmp_path / "step-1"), {"model": {"weight": WHOLE}})
    assert set(os.listdir(tmp_path / "step-1")) == {"manifest.json", "metadata.pkl", "model_0.pt"}
    assert verify(tmp_path / "step-1", strict=True).ok
    assert run_ranks(f"{BODIES}:loaded_as_shards", 2, tmp_path, str(tmp_path / "step-1")) == [True, True]
    flip_a_byte(tmp_path / "step-1" / "metadata.pkl")
    with pytest.raises(CorruptCheckpointError, match=r"metadata\.pkl: is damaged"):
        manager.load(tmp_path / "step-1", into={"model": {"weight": torch.zeros_like(WHOLE)}})
    manager.close()


# -- trainings --------------------------------------------------------------------------------------------------------


@pytest.fixture
def environment() -> Iterator[tuple[tuple[str, str], ...]]:
    """What a killed process leaves of torch's sharing lies in a directory with a short name: it has sockets there."""
    directory = tempfile.mkdtemp(prefix="tc-", dir="/tmp")
    yield (("TMPDIR", directory),)
    shutil.rmtree(directory)


@pytest.mark.long
@pytest.mark.parametrize("point", ["part.written"])
def test_a_training_that_is_killed_while_it_writes_resumes_bit_equal(
    tmp_path: Path, faults: Faults, point: str
) -> None:
    """Of the synchronous manager: the process that trains is the one that writes."""
    script = page_script("torch_checkpointing", tmp_path)
    script.write_text(script.read_text().replace('kind="async"', 'kind="sync"'))
    said = resumes_bit_equal(Training(script), tmp_path, faults, point, after=7)  # the third save's second file
    assert "resumed at step 8" in said
    assert verify(tmp_path / "broken" / "step-24", strict=True).ok


@pytest.mark.long
@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("point", ["save.copied", "part.written", "commit.manifest", "commit.published"])
def test_a_training_that_saves_asynchronously_is_killed_and_resumes_bit_equal(
    tmp_path: Path, faults: Faults, environment: tuple[tuple[str, str], ...], point: str, num_ranks: int
) -> None:
    """At ``save.copied`` the trainer is killed; at the others its subprocess, and the trainer fails at the next save."""
    after = {"save.copied": 3, "part.written": 7}.get(point, 2)
    training = Training(page_script("torch_checkpointing", tmp_path), num_ranks, environment)
    said = resumes_bit_equal(training, tmp_path, faults, point, after)
    assert "resumed at step 0" not in said
    found, skipped = list_checkpoints(tmp_path / "broken")
    assert [one.step for one in found] == [4, 8, 12, 16, 20, 24] and not skipped
    assert all(verify(one.path, strict=True).ok for one in found)


@pytest.mark.long
def test_a_trainer_that_is_killed_while_its_subprocess_writes_resumes_bit_equal(
    tmp_path: Path, faults: Faults, environment: tuple[tuple[str, str], ...]
) -> None:
    training = Training(page_script("torch_checkpointing", tmp_path), environment=environment)
    training.run(tmp_path / "whole")
    hold = faults.hold("part.written", after=7)
    command = [sys.executable, str(training.script), str(tmp_path / "broken")]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with hold, subprocess.Popen(command, env={**os.environ, **dict(environment)}, **quiet) as process:
        try:
            hold.wait()
        finally:
            process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        hold.release()
    said = training.run(tmp_path / "broken").output
    # 12: the subprocess gets SIGINT when its trainer dies, and commits what it has if this process was told to ignore that.
    assert re.search(r"resumed at step (8|12)$", said, re.MULTILINE)
    assert same(final(tmp_path / "whole"), final(tmp_path / "broken"))
