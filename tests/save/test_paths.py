"""``PathCheckpointer``: checkpoints by their paths, with one pool and one arena for all of them."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from stager import (
    ArgumentError,
    Checkpointer,
    CheckpointNotFoundError,
    ClosedError,
    ConfigError,
    DirectoryInUseError,
    Event,
    PathCheckpointer,
    PruneFate,
    UsageError,
    load_checkpoint,
    verify,
)
from tests.faults import Faults
from tests.staging.ranks import run_ranks


def config(**more: Any) -> dict[str, Any]:
    return {"workers": {"count": 2}, "persistence": {"fsync": False}, **more}


def state(value: float) -> dict[str, Any]:
    return {"x": torch.full((1000,), value), "step": int(value)}


def names(directory: Path) -> list[str]:
    return sorted(name for name in os.listdir(directory) if not name.startswith("."))


def test_saves_go_anywhere_and_share_workers_and_memory(tmp_path: Path) -> None:
    paths = [tmp_path / "a" / "checkpoint-10", tmp_path / "b" / "c" / "best=0.5.ckpt", tmp_path / "a" / "last"]
    with PathCheckpointer(config()) as ckpt:
        workers = psutil.Process().children(recursive=True)
        handles = [ckpt.save(path, state(n), metrics={"n": n}) for n, path in enumerate(paths)]
        infos = [handle.upload_completion.result() for handle in handles]
        assert psutil.Process().children(recursive=True) == workers
        assert [(info.path, info.step) for info in infos] == list(zip(map(str, paths), (10, 5, 0), strict=True))
        for n, path in enumerate(paths):
            assert torch.equal(ckpt.load(path).state["x"], state(n)["x"])
            assert verify(path).ok and load_checkpoint(path).state["step"] == n
    target = {"x": torch.zeros(1000)}
    with pytest.warns(UserWarning, match="single process"):
        dcp.load(target, checkpoint_id=paths[1])  # what stock torch reads, too
    assert torch.equal(target["x"], state(1)["x"])


def test_a_path_is_replaced_and_load_waits_for_what_is_in_flight(tmp_path: Path, faults: Faults) -> None:
    path = tmp_path / "out" / "last.ckpt"
    faults.arm("part.write", "delay 0.3 after=1")
    with PathCheckpointer(config()) as ckpt:
        for n in range(4):
            ckpt.save(path, state(n), step=n)
        loaded = ckpt.load(path, into=state(9))
        assert loaded.step == 3 and torch.equal(loaded.state["x"], state(3)["x"])
    assert names(tmp_path / "out") == ["last.ckpt"]


def test_a_run_sees_what_was_saved_into_its_directory_by_path(tmp_path: Path) -> None:
    with PathCheckpointer(config()) as ckpt:
        ckpt.save(tmp_path / "epoch=3.ckpt", state(1), step=30)
    with Checkpointer(tmp_path, config()) as run:
        assert run.load().step == 30
        run.save(31, state(2))
    assert names(tmp_path) == ["epoch=3.ckpt", "step-00000031"]


def test_models_and_optimizers_and_what_others_wrote_are_loaded(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    torch.save(model.state_dict(), tmp_path / "stock.pt")
    with PathCheckpointer(config()) as ckpt:
        ckpt.save(tmp_path / "ours", {"model": model}).upload_completion.result()
        other = nn.Linear(4, 4)
        ckpt.load(tmp_path / "ours", into={"model": other})
        assert torch.equal(other.weight, model.weight)
        again = nn.Linear(4, 4)
        ckpt.load(tmp_path / "stock.pt", into=again)
        assert torch.equal(again.weight, model.weight)
        with pytest.raises(CheckpointNotFoundError):
            ckpt.load(tmp_path / "none")


def test_delete(tmp_path: Path) -> None:
    events: list[Event] = []
    with PathCheckpointer(config(), on_event=events.append) as ckpt:
        ckpt.save(tmp_path / "a-1", state(1), files={"a.json": b"{}"}).upload_completion.result()
        ckpt.save(tmp_path / "a-2", state(2)).upload_completion.result()
        report = ckpt.delete(tmp_path / "a-1")
        assert [v.fate for v in report.verdicts] == [PruneFate.REMOVED] and report.freed_bytes > 4000
        with pytest.raises(CheckpointNotFoundError):
            ckpt.delete(tmp_path / "a-1")
    assert names(tmp_path) == ["a-2"]
    assert [event.name for event in events].count("pruned") == 1


@pytest.mark.parametrize("call", ["save", "close"])
def test_other_saves_go_on_while_one_is_deleted(tmp_path: Path, faults: Faults, call: str) -> None:
    """Held in the middle: saves elsewhere return. A save to that path, and close(), come after it."""
    out = tmp_path / "out"
    with ThreadPoolExecutor(2) as threads, PathCheckpointer(config()) as ckpt:
        ckpt.save(out / "a-1", state(1)).upload_completion.result()
        with faults.hold("remove.begin") as held:
            deleted = threads.submit(ckpt.delete, out / "a-1")
            held.wait()
            ckpt.save(out / "a-2", state(2)).staging_completion.result()
            after = threads.submit(ckpt.save, out / "a-1", state(3)) if call == "save" else threads.submit(ckpt.close)
            assert not wait([after, deleted], 0.5, FIRST_COMPLETED).done
            held.release()
        assert [verdict.fate for verdict in deleted.result().verdicts] == [PruneFate.REMOVED]
        after.result()
    assert names(out) == (["a-1", "a-2"] if call == "save" else ["a-2"])
    assert load_checkpoint(out / names(out)[0]).state["step"] == (3 if call == "save" else 2)


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("a/.hidden", "begin with a dot"),
        ("x.partial-0123456789abcdef", "no checkpoints"),
        ("", "path"),
        ("hdfs://name/x", "does not support hdfs"),
        ("x" * 201, "more than 200 bytes"),
    ],
)
def test_a_path_that_no_checkpoint_can_have_is_refused(tmp_path: Path, path: str, why: str) -> None:
    with PathCheckpointer(config()) as ckpt:
        with pytest.raises(ArgumentError, match=why):
            ckpt.save(path if "://" in path or not path else tmp_path / path, state(1))
        ckpt.save(tmp_path / "fine", state(1)).upload_completion.result()
    assert names(tmp_path) == ["fine"]


def test_what_is_somebody_elses_stays(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with PathCheckpointer(config()) as ckpt:
        ckpt.save(tmp_path / "mine", state(1)).upload_completion.result()
    assert verify(tmp_path / "mine").ok
    (aside,) = [path for path in tmp_path.iterdir() if path.name.startswith(".mine.not-a-checkpoint-")]
    assert (aside / "notes.txt").read_text() == "keep"


def test_settings_that_cannot_apply_are_refused_with_the_key() -> None:
    with pytest.raises(ConfigError, match="retention has rules"):
        PathCheckpointer(config(retention={"keep_latest": 1}))
    with pytest.raises(ConfigError, match=r"replication\.partners"):
        PathCheckpointer(config(replication={"partners": 1}))


def test_two_of_them_cannot_have_one_directory_and_the_first_one_goes_on(tmp_path: Path) -> None:
    with PathCheckpointer(config()) as ckpt:
        ckpt.save(tmp_path / "a-1", state(1))
        with PathCheckpointer(config()) as other:
            with pytest.raises(DirectoryInUseError, match=r"test_paths\.py"):
                other.save(tmp_path / "a-2", state(2))
            other.save(tmp_path / "other" / "a-2", state(2))
        code = (
            "import sys, stager, torch\n"
            "with stager.PathCheckpointer({'workers': {'count': 1}, 'persistence': {'lock_timeout_secs': 0}}) as ckpt:\n"
            "    try: ckpt.save(sys.argv[1], {'x': torch.ones(1)})\n"
            "    except stager.DirectoryInUseError as error: print(error)\n"
        )
        found = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "a-3")], capture_output=True, text=True, timeout=60, check=True
        )
        assert "another run" in found.stdout
        ckpt.save(tmp_path / "a-4", state(4))
    assert names(tmp_path) == ["a-1", "a-4", "other"]


def test_nothing_is_left_when_it_is_closed(tmp_path: Path) -> None:
    ckpt = PathCheckpointer(config())
    ckpt.save(tmp_path / "a-1", state(1))
    ckpt.close()
    ckpt.close()
    with pytest.raises(ClosedError):
        ckpt.save(tmp_path / "a-2", state(1))
    assert ckpt.load(tmp_path / "a-1").step == 1  # a closed one still loads
    with PathCheckpointer(config()) as other:
        other.save(tmp_path / "a-2", state(2))  # the lock is free


def test_guarded_saves_to_paths(tmp_path: Path) -> None:
    model = nn.Linear(64, 64)
    optimizer = torch.optim.Adam(model.parameters())
    with PathCheckpointer(config()) as ckpt:
        ckpt.guard(optimizer)
        kept = []
        for n in range(5):
            model(torch.randn(4, 64)).sum().backward()
            optimizer.step()
            kept.append(model.weight.detach().clone())
            ckpt.save(tmp_path / f"a-{n}", {"model": model, "optimizer": optimizer})
        for n in range(5):
            assert torch.equal(ckpt.load(tmp_path / f"a-{n}").state["model"]["weight"], kept[n])


def test_in_a_listener_it_is_refused(tmp_path: Path) -> None:
    errors: list[str] = []

    def listener(_: Event) -> None:
        for call in (lambda: ckpt.delete(tmp_path / "a-1"), lambda: ckpt.load(tmp_path / "a-1")):
            try:
                call()
            except UsageError as error:
                errors.append(str(error))

    with PathCheckpointer(config(), on_event=listener) as ckpt:
        ckpt.save(tmp_path / "a-1", state(1)).upload_completion.result()
    assert errors and all("by a listener" in error for error in errors)


@pytest.mark.parametrize("layout", ["plain", "fsdp"])
def test_of_several_ranks(tmp_path: Path, layout: str) -> None:
    results = run_ranks("tests.ranks.bodies:save_to_paths", 2, tmp_path, layout)
    for found in results:
        assert found == [[1, {"who": "0"}, []], [0, {"who": "0"}, []], False, 9]


def test_many_directories_leave_descriptors_where_they_were(tmp_path: Path) -> None:
    with PathCheckpointer(config()) as ckpt:
        counts = []
        for n in range(140):
            ckpt.save(tmp_path / str(n) / "last.ckpt", state(n), step=n).upload_completion.result()
            counts.append(psutil.Process().num_fds())
        assert counts[-1] <= counts[75] + 3
        ckpt.save(tmp_path / "0" / "last.ckpt", state(1000), step=1000)  # whose directory was let go of
        assert ckpt.load(tmp_path / "0" / "last.ckpt").step == 1000
        assert ckpt.load(tmp_path / "100" / "last.ckpt").step == 100


def test_recover_finishes_what_a_killed_process_has_left_before_anything_is_saved(
    tmp_path: Path, faults: Faults
) -> None:
    """The process is killed when its workers have all of the snapshot; they commit it, while the next one waits."""
    program = (
        "import sys, torch\nfrom stager import PathCheckpointer\n"
        "PathCheckpointer({'workers': {'count': 1}}).save(sys.argv[1], {'x': torch.ones(9)})\n"
    )
    faults.arm("save.handed-over", "kill")
    ended = subprocess.run([sys.executable, "-c", program, tmp_path / "out/checkpoint-5"], check=False)
    assert ended.returncode < 0
    with PathCheckpointer(config()) as ckpt:
        ckpt.recover(tmp_path / "out")
        assert names(tmp_path / "out") == ["checkpoint-5"]
        with PathCheckpointer(config()) as other, pytest.raises(DirectoryInUseError):
            other.recover(tmp_path / "out")
        with pytest.raises(UsageError, match="lies in"):
            ckpt.recover(tmp_path / "out/checkpoint-5")
        ckpt.recover(tmp_path / "new")
        ckpt.recover(tmp_path / "new")
        assert (tmp_path / "new").is_dir()
    with pytest.raises(ClosedError):
        ckpt.recover(tmp_path / "out")
