"""torchtitan: a training is resumed by either manager, whoever is killed meanwhile. docs/integrations/torchtitan.md."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from stager import (
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    FellBackEvent,
    StateMismatchError,
    StorageError,
    UsageError,
    export_weights,
    load_checkpoint,
    verify,
)
from tests import scripts
from tests.faults import Faults
from tests.integrations.training import Ended, final, page_script, resumes_bit_equal, resumes_from_any_point
from tests.integrations.training import Training as Script
from tests.staging.ranks import run_ranks
from tests.states import same

pytestmark = pytest.mark.filterwarnings("ignore")  # torchtitan and torch warn of their own code

pytest.importorskip("torchtitan", reason="pip install 'stager[torchtitan]'")
pytest.importorskip("triton", reason="torchtitan needs triton, which torch for processors alone comes without")

from tests.integrations import torchtitan_on_cpu  # noqa: F401  # isort: skip  # before the rest of torchtitan

from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torchtitan.components.checkpointer import CheckpointManager

from stager.integrations.torchtitan import StagerCheckpointManager
from tests.integrations.torchtitan_bodies import CONFIG, Adapter, Training, flip

ROOT = Path(__file__).parents[2]
BODIES = "tests.integrations.torchtitan_bodies"
STOCK: dict[str, Any] = {"manager": CheckpointManager}
HF: dict[str, Any] = {"last_save_in_hf": True, "last_save_model_only": True}
MANAGERS = [StagerCheckpointManager, CheckpointManager]


@pytest.fixture(autouse=True)
def one_rank(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone, which torchtitan needs; one thread of torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    torch.set_num_threads(before)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "outputs"


def checkpoints(out: Path) -> list[str]:
    """What is a checkpoint, or looks like one to torchtitan."""
    return sorted(name for name in os.listdir(out / "checkpoint") if re.search(r"step-\d", name))


def trained(out: Path, steps: int, *, last: bool = False, **options: Any) -> list[Any]:
    """Train in a folder from its beginning; return what was made."""
    training = Training(out, **options)
    training.step(steps, last=last)
    made = training.made()
    training.close()
    return made


# -- what is saved, and who reads it ----------------------------------------------------------------------------------


def test_a_checkpoint_has_the_keys_of_torchtitans_own_and_random_numbers(tmp_path: Path) -> None:
    found = []
    for manager in MANAGERS:
        out = tmp_path / manager.__name__
        trained(out, 2, manager=manager)
        metadata = FileSystemReader(out / "checkpoint" / "step-2").read_metadata()
        assert metadata.planner_data.keys() == metadata.state_dict_metadata.keys()
        found.append(metadata.planner_data)
    ours, theirs = found
    assert {key: path for key, path in ours.items() if not key.startswith("rng.")} == theirs
    assert any(key.startswith("rng.rank-0.") for key in ours)
    assert verify(tmp_path / "StagerCheckpointManager/checkpoint/step-2").ok


@pytest.mark.parametrize("reader", MANAGERS)
@pytest.mark.parametrize("writer", MANAGERS)
def test_either_manager_goes_on_from_what_either_has_saved(out: Path, writer: type[Any], reader: type[Any]) -> None:
    with_random = writer is reader is StagerCheckpointManager
    made = trained(out, 4, manager=writer)
    again = Training(out, reader, seed=1)
    assert again.manager.load() is True
    assert same(again.made()[: 6 if with_random else 5], made[: 6 if with_random else 5])
    again.step(2)
    again.close()
    assert checkpoints(out) == ["step-2", "step-4", "step-6"]


@pytest.mark.parametrize("guard", [True, False])
def test_a_resumed_training_ends_with_the_same_bits(tmp_path: Path, guard: bool) -> None:
    whole = trained(tmp_path / "whole", 9, guard=guard)
    trained(tmp_path / "broken", 5, guard=guard)
    again = Training(tmp_path / "broken", guard=guard, seed=1)
    assert again.manager.load() and again.progress.step == 4
    again.step(5)
    assert same(again.made(), whole)
    again.close()


def test_random_numbers_are_left_alone_where_that_is_asked_for(out: Path) -> None:
    trained(out, 2)
    again = Training(out, exclude_from_loading=["rng"])
    before = torch.get_rng_state()
    assert again.manager.load()
    assert torch.equal(torch.get_rng_state(), before)
    again.close()


def test_random_numbers_of_another_number_of_ranks_are_left_alone(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(out, 2)
    again = Training(out)
    before = torch.get_rng_state()
    monkeypatch.setattr("stager.integrations.torchtitan.num_ranks", lambda: 2)
    assert again.manager.load()
    assert torch.equal(torch.get_rng_state(), before) and again.progress.step == 2
    again.close()


def test_without_save_rng_the_keys_are_torchtitans_own(out: Path) -> None:
    trained(out, 2, save_rng=False)
    assert "rng" not in load_checkpoint(out / "checkpoint/step-2").state
    again = Training(out)
    assert again.manager.load()
    again.close()


# -- what is taken for a checkpoint -----------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", MANAGERS)
def test_what_is_not_committed_is_no_checkpoint_to_either(out: Path, reader: type[Any], faults: Faults) -> None:
    """Also if it has ``.metadata``, as it has at the moment before the commit."""
    training = Training(out)
    training.step(2)
    training.manager.maybe_wait_for_saving()
    with faults.hold("part.write") as hold:
        training.step(2)
        hold.wait()
        (partial,) = (out / "checkpoint").glob(".*.partial-*")
        assert partial.name.startswith(".step-~4.partial-")
        shutil.copytree(partial, out / "copy")
        hold.release()
        training.close()
    shutil.rmtree(out / "checkpoint/step-4")
    (out / "copy").rename(partial)
    (partial / ".metadata").write_bytes((out / "checkpoint/step-2/.metadata").read_bytes())
    again = Training(out, reader, seed=1)
    assert again.manager.load() and again.progress.step == 2
    again.close()
    if partial.exists():
        shutil.rmtree(partial)


def test_a_name_with_a_step_somewhere_in_it_is_no_checkpoint(out: Path) -> None:
    """torchtitan's own manager takes ``old-step-8`` for step 8, and then does not find ``step-8``."""
    trained(out, 2)
    folder = out / "checkpoint"
    shutil.copytree(folder / "step-2", folder / "old-step-8")
    (folder / "step-6").mkdir()
    (folder / "step-6" / "__0_0.distcp").write_bytes(b"half")
    stock = Training(out, CheckpointManager)
    with pytest.raises(FileNotFoundError):
        stock.manager.load()
    stock.close()
    again = Training(out, seed=1, keep_latest_k=2)
    assert again.manager.load() and again.progress.step == 2
    again.step(4)
    again.close()
    assert checkpoints(out) == ["old-step-8", "step-4", "step-6"]


def resumed(out: Path, **options: Any) -> Training:
    """A training that goes on, and has loaded its checkpoint."""
    training = Training(out, seed=1, **options)
    try:
        assert training.manager.load()
    except BaseException:
        training.close()
        raise
    return training


# What one training after the other does in a folder, each from the newest checkpoint: its steps, and its settings.
LAYOUTS: dict[str, tuple[list[tuple[int, dict[str, Any]]], int]] = {
    "of the same kind": ([(4, {})], 2),
    "the model alone": ([(5, {"last": True, "last_save_model_only": True}), (2, {})], 4),
    "a seed": ([(0, {"last_save_model_only": True}), (2, {})], 0),
    "torchtitan's own": ([(4, STOCK), (2, {})], 4),
    "without random numbers": ([(2, {"save_rng": False}), (2, {})], 2),
    "of stager, below one of torchtitan's": ([(2, {}), (2, STOCK)], 2),
}


def laid_out(out: Path, trainings: list[tuple[int, dict[str, Any]]]) -> dict[int, list[Any]]:
    """Train, one training after the other. Returns what had been made at each step."""
    made = {}
    for steps, options in trainings:
        last = options.get("last", False)
        training = Training(out, **{name: value for name, value in options.items() if name != "last"})
        training.manager.load()
        for number in range(steps):
            training.step(last=last and number == steps - 1)
            made[training.progress.step] = copy.deepcopy(training.made(with_random=False))
        if steps == 0:
            training.manager.save(0, last_step=True)
            made[0] = training.made(with_random=False)
        training.close()
    return made


@pytest.mark.parametrize("load_only", [False, True])
@pytest.mark.parametrize("damage", ["data", "metadata"])
@pytest.mark.parametrize("below", LAYOUTS)
def test_a_damaged_newest_is_passed_over_whatever_is_below_it(
    out: Path, below: str, damage: str, load_only: bool, caplog: pytest.LogCaptureFixture
) -> None:
    trainings, expected = LAYOUTS[below]
    made = laid_out(out, trainings)
    newest = out / "checkpoint" / max(checkpoints(out))
    if damage == "metadata":
        (newest / ".metadata").write_bytes(b"damaged")
    elif (newest / "manifest.json").exists():
        flip(newest / "__0_0.distcp")
    else:  # torchtitan's own has no hashes
        os.truncate(newest / "__0_0.distcp", 100)
    again = resumed(out, load_only=load_only)
    assert again.progress.step == expected
    found = copy.deepcopy(again.made(with_random=False))
    skipped = [one.name for one in again.manager.checkpointer.skipped if one.step is not None]
    again.close()
    if expected == 0:  # a seed has the model alone
        fresh = Training(out, load_only=True)
        made[0][1:] = fresh.made(with_random=False)[1:]
        fresh.close()
    assert same(found, made[expected])
    assert f"{newest} is passed over: " in caplog.text
    assert skipped == [newest.name]


def test_several_damaged_ones_are_passed_over_and_listeners_hear_of_it(out: Path) -> None:
    trained(out, 8)
    for step in (8, 4):
        flip(out / f"checkpoint/step-{step}/__0_0.distcp")
    (out / "checkpoint/step-6/.metadata").unlink()
    events: list[FellBackEvent] = []
    again = Training(out, seed=1)
    again.manager.checkpointer.listen(lambda event: events.append(event) if isinstance(event, FellBackEvent) else None)
    assert again.manager.load() and again.progress.step == 2
    again.close()
    (event,) = events
    assert (event.step, [one.step for one in event.skipped]) == (2, [8, 6, 4])


@pytest.mark.parametrize("damage", ["data", "metadata", "all of it"])
def test_a_folder_whose_checkpoints_are_all_damaged_is_no_fresh_start(out: Path, damage: str) -> None:
    trained(out, 5, last=True, last_save_model_only=True)
    for step in (2, 4):
        path = out / f"checkpoint/step-{step}"
        if damage == "data":
            flip(path / "__0_0.distcp")
        elif damage == "metadata":
            (path / ".metadata").write_bytes(b"damaged")
        else:
            (path / ".metadata").unlink()
    advice = "has no other one to go on from: put one of them back from a copy, or remove them all"
    with pytest.raises(CorruptCheckpointError, match=rf"step-4: .*{advice}"):
        resumed(out)
    for step in (2, 4):
        shutil.rmtree(out / f"checkpoint/step-{step}")
    training = Training(out)
    assert training.manager.load() is False
    training.close()


def test_a_step_that_was_asked_for_and_is_damaged_is_an_error_that_names_those_to_go_on_from(out: Path) -> None:
    laid_out(out, [(4, STOCK), (2, {}), (1, {"last": True, "last_save_model_only": True})])
    flip(out / "checkpoint/step-6/__0_0.distcp")
    training = Training(out)
    with pytest.raises(CorruptCheckpointError, match=r"set load_step to another step: 4, 2$"):
        training.manager.load(6)
    assert training.manager.load(4)
    training.close()


def test_a_seed_is_not_loaded_where_a_damaged_checkpoint_may_have_overwritten_the_optimizer(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is verified before it is loaded. Here the damage comes after that."""
    laid_out(out, LAYOUTS["a seed"][0])
    flip(out / "checkpoint/step-2/__0_0.distcp")
    monkeypatch.setattr("stager.integrations.torchtitan_parts.contents._verify", lambda path: None)
    with pytest.raises(CorruptCheckpointError, match=r"set load_step to another step: 0$"):
        resumed(out)


def test_a_step_that_is_not_there_is_an_error_that_names_those_that_are(out: Path) -> None:
    trained(out, 4)
    training = Training(out)
    assert training.manager.load(2) and training.progress.step == 2
    with pytest.raises(CheckpointNotFoundError, match=r"load_step=3: .*no such directory.*: 2, 4"):
        training.manager.load(3)
    training.close()


def test_the_training_goes_back_to_an_earlier_step(out: Path) -> None:
    trained(out, 6)
    again = Training(out)
    assert again.manager.load(2)
    again.step(2)
    made = again.made()
    again.close()
    assert checkpoints(out) == ["step-2", "step-4", "step-6"]
    last = Training(out, seed=1)
    assert last.manager.load(4) and same(last.made(), made)
    last.close()


def test_a_checkpoint_of_torchtitans_is_set_aside_when_its_step_is_saved_again(out: Path) -> None:
    trained(out, 4, **STOCK)
    again = Training(out)
    assert again.manager.load(2)
    again.step(2)
    made = again.made()
    again.close()
    assert checkpoints(out) == ["step-2", "step-4"]
    assert len(list((out / "checkpoint").glob(".step-~4.not-a-checkpoint-*"))) == 1
    last = Training(out, seed=1)
    assert last.manager.load() and same(last.made(), made)
    last.close()


# -- when, and how many -----------------------------------------------------------------------------------------------


def test_saves_are_due_as_torchtitans(tmp_path: Path) -> None:
    for manager in MANAGERS:
        out = tmp_path / manager.__name__
        trained(out, 7, last=True, manager=manager, interval=3, enable_first_step_checkpoint=True)
        assert checkpoints(out) == ["step-1", "step-3", "step-6", "step-7"]


def test_keep_latest_k_holds_after_the_last_save_too(tmp_path: Path) -> None:
    """torchtitan's own manager removes nothing after the last save, and counts what it has just begun."""
    for manager, kept in ((StagerCheckpointManager, 2), (CheckpointManager, 3)):
        out = tmp_path / manager.__name__
        trained(out, 8, last=True, manager=manager, keep_latest_k=2)
        assert checkpoints(out) == ["step-2", "step-4", "step-6", "step-8"][-kept:]


def test_keep_latest_k_counts_and_removes_what_torchtitan_has_left(out: Path) -> None:
    trained(out, 6, **STOCK)
    again = Training(out, keep_latest_k=2)
    assert again.manager.load() and again.progress.step == 6
    again.step(2)
    again.close()
    assert checkpoints(out) == ["step-6", "step-8"]


def test_load_only_changes_nothing(out: Path) -> None:
    made = trained(out, 4)
    before = sorted(os.listdir(out / "checkpoint"))
    again = Training(out, load_only=True, seed=1)
    assert again.manager.load() and same(again.made(), made)
    again.step(2)
    assert again.manager.save(8, last_step=True) is False
    again.close()
    assert sorted(os.listdir(out / "checkpoint")) == before


def test_a_disabled_manager_does_nothing(out: Path) -> None:
    training = Training(out, enable=False)
    training.step(2)
    assert training.manager.load() is False and training.manager.save(2) is False
    training.close()
    assert not out.exists()


# -- waiting ----------------------------------------------------------------------------------------------------------


def test_the_optimizers_inside_are_guarded(out: Path) -> None:
    for guard in (True, False):
        training = Training(out, guard=guard)
        (inner,) = training.optimizers.optimizers
        assert len(inner._optimizer_step_pre_hooks) == guard
        training.close()
        assert not inner._optimizer_step_pre_hooks


def test_what_a_step_changes_is_copied_when_waiting_for_staging_ends(out: Path) -> None:
    training = Training(out)
    training.step(2)
    training.manager.maybe_wait_for_staging()
    saved = training.made(with_random=False)[0]
    with torch.no_grad():
        for parameter in training.parts[0].parameters():
            parameter.zero_()
    training.close()
    found = load_checkpoint(out / "checkpoint/step-2").state
    assert same({name: found[name] for name in saved}, saved)


def test_close_waits_for_the_commits_of_all_saves(out: Path, faults: Faults) -> None:
    faults.arm("part.write", "delay 0.2")
    training = Training(out)
    training.step(4)
    assert not training.manager.save_future.done()
    training.manager.close()
    assert checkpoints(out) == ["step-2", "step-4"]


def test_maybe_wait_for_saving_waits_for_all_of_them(out: Path, faults: Faults) -> None:
    faults.arm("part.write", "delay 0.2")
    training = Training(out)
    training.step(4)
    training.manager.maybe_wait_for_saving()
    assert checkpoints(out) == ["step-2", "step-4"] and training.manager.save_future is None
    training.close()


def test_an_error_of_a_save_is_raised_by_the_end(out: Path, faults: Faults) -> None:
    faults.arm("part.write", "errno ENOSPC")
    training = Training(out)
    training.step(2)
    with pytest.raises(OSError, match="No space left"):
        training.manager.close()
    assert checkpoints(out) == []


# -- the model alone --------------------------------------------------------------------------------------------------


def test_the_last_save_has_the_model_alone_and_training_goes_on_from_the_one_before(
    out: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """torchtitan's own manager takes it for the newest checkpoint, and fails."""
    made = trained(out, 5, last=True, last_save_model_only=True, export_dtype="bfloat16")
    weights = load_checkpoint(out / "checkpoint/step-5").state
    assert same(dict(weights), {name: value.bfloat16() for name, value in made[0].items()})

    stock = Training(out, CheckpointManager)
    with pytest.raises(CheckpointException):
        stock.manager.load()
    stock.close()
    again = Training(out, seed=1)
    assert again.manager.load() and again.progress.step == 4
    assert "step-5 is passed over: it has the model only" in caplog.text
    with pytest.raises(StateMismatchError, match="train_state"):
        again.manager.load(5)
    again.close()

    for manager in MANAGERS:
        path = str(out / "checkpoint/step-5")
        other = Training(tmp_path / manager.__name__, manager, seed=1, initial_load_path=path)
        assert other.manager.load() and other.progress.step == 0
        assert same(other.made()[0], {name: value.bfloat16().float() for name, value in made[0].items()})
        other.close()


def test_a_seed_checkpoint_gives_the_model_alone(tmp_path: Path) -> None:
    for manager in MANAGERS:
        out = tmp_path / manager.__name__
        seed = Training(out, create_seed_checkpoint=True, last_save_model_only=True)
        assert seed.manager.save(curr_step=0, last_step=True)
        weights = seed.made()[0]
        seed.close()
        again = Training(out, manager, seed=1)
        assert again.manager.load()
        assert same(again.made()[0], weights) and again.progress.step == 0
        again.close()


@pytest.mark.parametrize("writer", MANAGERS)
def test_initial_load_path_gives_all_or_the_model(out: Path, tmp_path: Path, writer: type[Any]) -> None:
    made = trained(out, 2, manager=writer)
    path = str(out / "checkpoint/step-2")
    model = Training(tmp_path / "model", initial_load_path=path, seed=1)
    assert model.manager.load() and same(model.made()[0], made[0]) and model.progress.step == 0
    model.close()
    all_of_it = Training(tmp_path / "all", initial_load_path=path, initial_load_model_only=False, seed=1)
    assert all_of_it.manager.load() and same(all_of_it.made()[:5], made[:5])
    all_of_it.step(2)
    all_of_it.close()
    again = Training(tmp_path / "all", initial_load_path=path, initial_load_model_only=False, seed=1)
    assert again.manager.load() and again.progress.step == 4  # the folder's own comes first
    again.close()


def test_what_is_excluded_stays(out: Path) -> None:
    made = trained(out, 2)
    again = Training(out, seed=1, exclude_from_loading=["optimizer", "lr_scheduler", "train_state"])
    assert again.manager.load()
    found = again.made()
    assert same(found[0], made[0]) and not same(found[1], made[1])
    assert again.progress.step == 0 and again.position.num_batches == 2
    again.close()
    wrong = Training(out, exclude_from_loading=["data_loader"])
    with pytest.raises(ConfigError, match="exclude_from_loading has data_loader; there are train_state, model"):
        wrong.manager.load()
    wrong.close()


# -- the layout of Hugging Face ---------------------------------------------------------------------------------------


def test_the_last_save_in_hf_is_what_torchtitans_own_writes(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    found = []
    for manager in MANAGERS:
        out = tmp_path / manager.__name__
        options = {"last_save_in_hf": True, "last_save_model_only": True, "export_dtype": "bfloat16"}
        trained(out, 3, last=True, manager=manager, adapter=Adapter(), **options)
        weights = load_checkpoint(next((out / "checkpoint/step-3").glob("*.safetensors"))).state
        found.append(dict(weights))
    assert found[0].keys() == {"model.0.weight", "model.0.bias", "model.2.weight", "model.2.bias"}
    assert same(*found)
    left = os.listdir(tmp_path / "StagerCheckpointManager/checkpoint")
    assert sorted(left) == [".stager.lock", "step-2", "step-3"]


@pytest.mark.parametrize("writer", MANAGERS)
def test_weights_in_the_layout_of_hugging_face_are_loaded(out: Path, tmp_path: Path, writer: type[Any]) -> None:
    pytest.importorskip("safetensors")
    options = {"last_save_in_hf": True, "last_save_model_only": True, "export_dtype": "bfloat16"}
    made = trained(out, 1, last=True, manager=writer, adapter=Adapter(), **options)
    path = str(out / "checkpoint/step-1")
    expected = {name: value.bfloat16().float() for name, value in made[0].items()}
    for adapter, initial in ((Adapter(), path), (Adapter(path), None)):
        again = Training(
            tmp_path / str(initial is None), adapter=adapter, initial_load_in_hf=True, initial_load_path=initial, seed=1
        )
        assert again.manager.load() and same(again.made()[0], expected)
        again.close()


def hf_weights(made: list[Any]) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in Adapter().to_hf(made[0]).items()}


def write_index(directory: Path, weight_map: dict[str, str]) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("reader", MANAGERS)
@pytest.mark.parametrize(
    "layout",
    ["another file beside", "no index", "an index, and a file it does not name", "links", "saved by each rank"],
)
def test_all_files_of_a_directory_are_read_as_torchtitan_reads_them(
    out: Path, tmp_path: Path, layout: str, reader: type[Any]
) -> None:
    pytest.importorskip("safetensors")
    from safetensors.torch import save_file

    path = tmp_path / "weights"
    if layout == "saved by each rank":
        made = trained(out, 1, last=True, manager=CheckpointManager, adapter=Adapter(), **HF)
        path = out / "checkpoint/step-1/sharded"
    else:
        made = trained(out, 1)
        path.mkdir()
        weights = hf_weights(made)
        first, second = dict(list(weights.items())[:2]), dict(list(weights.items())[2:])
        if layout == "another file beside":
            save_file({**weights, "model.inv_freq": torch.ones(2)}, path / "model.safetensors")
            save_file({"lora": torch.ones(3)}, path / "adapter_model.safetensors")
        else:
            save_file(first, path / "model-00001-of-00002.safetensors")
            save_file(second, path / "model-00002-of-00002.safetensors")
        if layout == "an index, and a file it does not name":
            write_index(path, dict.fromkeys(first, "model-00001-of-00002.safetensors"))
        if layout == "links":
            for number, file in enumerate(sorted(path.iterdir())):
                blob = tmp_path / f"blob-{number}"
                file.rename(blob)
                file.symlink_to(blob)
    again = Training(
        tmp_path / "again", reader, adapter=Adapter(), initial_load_in_hf=True, initial_load_path=str(path), seed=1
    )
    assert again.manager.load() and same(again.made()[0], made[0])
    again.close()


def test_a_tensor_in_two_files_is_an_error_unless_an_index_says_in_which(out: Path, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    from safetensors.torch import save_file

    made, path = trained(out, 1), tmp_path / "weights"
    path.mkdir()
    weights = hf_weights(made)
    save_file({**weights, "other": torch.ones(1)}, path / "model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()} | {"other": torch.ones(1)}, path / "a.safetensors")
    options: dict[str, Any] = {"adapter": Adapter(), "initial_load_in_hf": True, "initial_load_path": str(path)}
    again = Training(tmp_path / "again", seed=1, **options)
    message = r"model\.0\.bias is in two files, a\.safetensors and model\.safetensors, .* move one of them away"
    with pytest.raises(UsageError, match=message):
        again.manager.load()
    write_index(path, dict.fromkeys(weights, "model.safetensors"))
    assert again.manager.load() and same(again.made()[0], made[0])  # nobody asks for "other"
    write_index(path, dict.fromkeys(weights, "gone.safetensors"))
    with pytest.raises(CorruptCheckpointError, match=r"names gone\.safetensors, which is missing"):
        again.manager.load()
    again.close()


def test_weights_that_the_files_do_not_have_are_an_error(out: Path, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    from safetensors.torch import save_file

    made, path = trained(out, 1), tmp_path / "weights"
    path.mkdir()
    *_, (last, value) = weights = list(hf_weights(made).items())
    save_file(dict(weights[:-1]), path / "model.safetensors")
    save_file({"other": value}, path / "other.safetensors")
    again = Training(out / "again", adapter=Adapter(), initial_load_in_hf=True, initial_load_path=str(path), seed=1)
    before = again.made(with_random=False)[0]
    with pytest.raises(StateMismatchError, match=re.escape(last)):
        again.manager.load()
    assert same(again.made(with_random=False)[0], before)
    again.close()


def test_weights_in_the_layout_of_hugging_face_are_no_checkpoint_to_go_on_from(out: Path) -> None:
    trained(out, 3, last=True, adapter=Adapter(), last_save_in_hf=True, last_save_model_only=True)
    again = Training(out, seed=1, adapter=Adapter(), last_save_in_hf=True, last_save_model_only=True)
    with pytest.raises(CheckpointNotFoundError, match=r"load_step=3: .*initial_load_in_hf"):
        again.manager.load(3)
    assert again.manager.load() and again.progress.step == 2
    again.step(1, last=True)  # the export is replaced
    again.close()
    assert checkpoints(out) == ["step-2", "step-3"]


AT_STEP_4: dict[str, dict[str, Any]] = {
    "a checkpoint": {},
    "an export": {"adapter": Adapter(), **HF},
    "torchtitan's checkpoint": STOCK,
    "torchtitan's export": {"adapter": Adapter(), **STOCK, **HF},
}


def files_in(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def set_aside(out: Path) -> list[dict[str, bytes]]:
    return [files_in(path) for path in (out / "checkpoint").glob(".step-~4.not-a-checkpoint-*")]


def export_again(out: Path) -> None:
    """End a training that has gone back to step 2 at step 4, with an export."""
    training = Training(out, adapter=Adapter(), **HF)
    try:
        training.manager.load(2)
        training.step(2, last=True)
    finally:
        training.close()


def is_exported(out: Path) -> bool:
    return os.listdir(out / "checkpoint/step-4") == ["model.safetensors"]


@pytest.mark.parametrize("there", AT_STEP_4)
def test_an_export_takes_the_place_of_whatever_has_its_name(out: Path, there: str) -> None:
    """What is torchtitan's own is set aside."""
    trained(out, 4, last=True, **AT_STEP_4[there])
    before = files_in(out / "checkpoint/step-4")
    export_again(out)
    assert is_exported(out)
    assert set_aside(out) == ([before] if "torchtitan" in there else [])
    assert not (out / "checkpoint/.hf_export").exists()


@pytest.mark.parametrize("what", ["a directory", "a file", "a link", "an export with a file of its user", "protected"])
def test_an_export_sets_aside_what_is_not_stagers_to_remove(
    out: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    if what == "protected":
        training = Training(out)
        training.step(4)
        training.manager.checkpointer.protect(4)
        training.close()
    else:
        trained(out, 2)
        path = out / "checkpoint/step-4"
        if what == "a file":
            path.write_bytes(b"mine")
        elif what == "a link":
            (out / "elsewhere").mkdir()
            path.symlink_to(out / "elsewhere")
        else:
            if what != "a directory":
                trained(out, 4, last=True, **AT_STEP_4["an export"])
            path.mkdir(exist_ok=True)
            (path / "mine").write_bytes(b"mine")
    export_again(out)
    assert is_exported(out) and not (out / "checkpoint/step-4").is_symlink()
    (aside,) = (out / "checkpoint").glob(".step-~4.not-a-checkpoint-*")
    assert f"what had this name is now {aside}" in caplog.text
    if what == "protected":
        assert verify(aside).ok
    elif what == "a link":
        assert aside.readlink() == out / "elsewhere"
    else:
        assert (aside if what == "a file" else aside / "mine").read_bytes() == b"mine"


KILLS = [
    ("export.written", True),
    ("hf_export.written", True),
    ("hf_export.named", True),
    ("hf_export.between", False),
    ("hf_export.named", False),
]


@pytest.mark.parametrize(
    ("there", "point", "exchanges"),
    [
        pytest.param(there, *kill, marks=[] if there == "a checkpoint" else pytest.mark.long)
        for there in (*AT_STEP_4, "nothing")
        for kill in KILLS
        if (there, kill[0]) != ("nothing", "hf_export.between")  # then there is nothing between
    ],
)
def test_what_has_the_name_is_there_or_the_export_is_whenever_it_is_killed(
    out: Path, tmp_path: Path, there: str, point: str, exchanges: bool, faults: Faults
) -> None:
    trained(out, 4, last=True, **AT_STEP_4.get(there, {}))
    path = out / "checkpoint/step-4"
    if there == "nothing":
        shutil.rmtree(path)
    before = files_in(path)
    faults.arm(point, "kill")
    source = "import sys, warnings\nwarnings.simplefilter('ignore')\nfrom {0} import export\nexport(*sys.argv[1:])"
    ended = scripts.run(source.format(BODIES), out, tmp_path / "other-group", exchanges, modules=(BODIES,))
    assert ended.returncode == -signal.SIGKILL and faults.fired(point)
    assert point == "hf_export.between" or files_in(path) == before or is_exported(out)
    Training(out).close()
    assert files_in(path) == before or is_exported(out)
    assert point != "hf_export.between" or files_in(path) == before
    assert point != "hf_export.written" or (is_exported(out) if there == "nothing" else files_in(path) == before)
    for _ in range(2):
        export_again(out)
        assert is_exported(out) and not (out / "checkpoint/.hf_export").exists()
    assert set_aside(out) == ([before] if "torchtitan" in there else [])


def test_a_removal_of_what_an_export_has_replaced_is_finished_when_it_was_killed(
    out: Path, tmp_path: Path, faults: Faults
) -> None:
    trained(out, 4)
    faults.arm("prune.removing", "kill")
    source = "import sys, warnings\nwarnings.simplefilter('ignore')\nfrom {0} import export\nexport(*sys.argv[1:])"
    ended = scripts.run(source.format(BODIES), out, tmp_path / "other-group", True, modules=(BODIES,))
    assert ended.returncode == -signal.SIGKILL and faults.fired("prune.removing")
    assert is_exported(out) and len(list((out / "checkpoint").glob(".step-~4.removing-*"))) == 1
    Training(out).close()
    assert not list((out / "checkpoint").glob(".step-~4.*"))


def test_an_export_that_fails_says_where_the_weights_are(out: Path, tmp_path: Path, faults: Faults) -> None:
    trained(out, 4)
    before = files_in(out / "checkpoint/step-4")
    faults.arm("export.written", "errno ENOSPC")
    with pytest.raises(OSError, match=r"step-4: the last weights were not exported: .*No space left") as raised:
        export_again(out)
    assert files_in(out / "checkpoint/step-4") == before
    (advised,) = re.findall(r"stager\.export_weights\('(.*)', OUT\)", str(raised.value))
    assert export_weights(advised, tmp_path / "weights").files == ("model.safetensors",)
    export_again(out)
    assert files_in(out / "checkpoint/step-4") == files_in(tmp_path / "weights")
    assert not (out / "checkpoint/.hf_export").exists()


def test_what_is_in_the_way_of_every_export_is_found_when_the_training_begins(out: Path) -> None:
    trained(out, 2)
    (out / "checkpoint/.hf_export").touch()
    with pytest.raises(StorageError, match=r"\.hf_export: .*move it away"):
        Training(out, adapter=Adapter(), **HF)


def test_a_save_of_the_last_step_in_flight_does_not_take_the_name_back(out: Path, faults: Faults) -> None:
    faults.arm("part.write", "delay 0.2")
    training = Training(out, adapter=Adapter(), **HF)
    training.step(2)
    assert training.manager.save(2, last_step=True)
    training.close()
    assert [one.name for one in (out / "checkpoint/step-2").iterdir()] == ["model.safetensors"]


# -- settings ---------------------------------------------------------------------------------------------------------


def test_settings_that_cannot_be_followed_are_refused(out: Path) -> None:
    for settings, message in (
        ({"stager_settings": {"persistence": {"format": "torch"}}}, "persistence.format is torch"),
        (
            {"stager_settings": {"retention": {"keep_latest": 3}}, "keep_latest_k": 2},
            "keep_latest_k is 2, and retention",
        ),
        (
            {"stager_settings": {"persistence": {"name": "ck-{step}"}}},
            "persistence.name is 'ck-{step}', .* take it out",
        ),
        ({"folder": "s3://bucket/run"}, "checkpoint.folder is 's3://bucket/run'"),
        (
            {"last_save_in_hf": True, "last_save_model_only": True},
            "last_save_in_hf is True, and this model has no sd_adapter",
        ),
    ):
        with pytest.raises((ConfigError, ValueError), match=message):
            Training(out, **settings)
    for settings, message in (
        ({"initial_load_path": "s3://bucket/run"}, "checkpoint.initial_load_path is 's3://bucket/run'"),
        (
            {"initial_load_in_hf": True, "initial_load_path": "/nowhere"},
            "initial_load_in_hf is True, and this model has no",
        ),
        ({"initial_load_in_hf": True, "adapter": Adapter()}, "set initial_load_path or hf_assets_path"),
    ):
        training = Training(out, **settings)
        with pytest.raises(ConfigError, match=message):
            training.manager.load()
        training.close()
    training = Training(out, initial_load_path=str(out))
    with pytest.raises(CheckpointNotFoundError, match="its save was not finished, or it is something else"):
        training.manager.load()
    training.close()


def test_the_rules_of_stagers_retention_are_taken_where_torchtitan_keeps_all(out: Path) -> None:
    trained(out, 8, stager_settings={**CONFIG, "retention": {"keep_latest": 1, "keep_every": 4}})
    assert checkpoints(out) == ["step-4", "step-8"]


def test_the_settings_are_flags_of_the_command_line(tmp_path: Path) -> None:
    import tyro

    path = tmp_path / "stager.yaml"
    path.write_text("arena:\n  buffers: 3\n")
    arguments = ["--interval", "7", "--no-guard", "--stager-config", str(path)]
    config = tyro.cli(
        StagerCheckpointManager.Config, args=arguments, default=StagerCheckpointManager.Config(folder="here")
    )
    assert (config.interval, config.folder, config.guard, config.enable) == (7, "here", False, True)
    assert config.stager_config == str(path)
    assert config.to_dict()["save_rng"] is True
    with pytest.raises(ValueError, match="stager_config names a file, and stager_settings has settings"):
        StagerCheckpointManager.Config(stager_config=str(path), stager_settings=CONFIG)
    training = Training(tmp_path, stager_config=str(path), stager_settings={})
    assert training.manager.checkpointer._config.arena.buffers == 3
    training.close()


# -- several processes, and whole scripts -----------------------------------------------------------------------------


@pytest.mark.parametrize("writer", ["stager", "torchtitan"])
def test_stages_of_a_pipeline_are_loaded_each_by_its_rank(tmp_path: Path, out: Path, writer: str) -> None:
    first, second = run_ranks(f"{BODIES}:stages", 2, tmp_path, str(out), writer)
    assert (first, second[0]) == (["a0.bias", "a0.weight", "b0.bias", "b0.weight"], "a1.bias")
    state = load_checkpoint(out / "checkpoint/step-2").state
    assert {*first, *second} < set(state)
    assert {"dp_rank_0", "dp_rank_1"} < set(state["dataloader"])


@pytest.mark.long
@pytest.mark.parametrize("how", ["truncated", "flipped"])
def test_a_damaged_newest_is_restored_from_a_replica(tmp_path: Path, out: Path, how: str) -> None:
    assert run_ranks(f"{BODIES}:replicated", 2, tmp_path, str(out), how) == [4, 4]


@pytest.mark.parametrize("writer", ["stager", "torchtitan"])
def test_damage_that_one_rank_finds_is_passed_over_by_all(tmp_path: Path, out: Path, writer: str) -> None:
    assert run_ranks(f"{BODIES}:damaged_stage", 2, tmp_path, str(out), writer) == [[2, 2], [2, 2]]


class Forked(Script):
    """The script, in processes that have imported torchtitan already."""

    def run(self, out: Path, *arguments: object, check: bool = True) -> Ended:
        source = f"import warnings\nwarnings.simplefilter('ignore')\n{self.script.read_text()}"
        with warnings.catch_warnings():
            ended = scripts.run(source, out, *arguments, modules=(BODIES,))
        assert not check or ended.returncode == 0, ended
        return Ended(ended.returncode, ended.stdout)


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The page's script, on a machine without an accelerator; it imports ``tests``, wherever it is run."""
    monkeypatch.setenv("STAGER_WORKERS__COUNT", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
    path = page_script("torchtitan", tmp_path)
    path.write_text(
        f"from tests.integrations import torchtitan_on_cpu\ntorchtitan_on_cpu.prepare()\n{path.read_text()}"
    )
    return path


def test_torchtitans_trainer_killed_in_the_middle_of_a_save_resumes_bit_equal(
    script: Path, tmp_path: Path, faults: Faults
) -> None:
    said = resumes_bit_equal(Forked(script), tmp_path, faults, "save.copied", 3)
    assert "Training starts at step 13" in said


def test_fsdp2_on_two_ranks_resumes_bit_equal(
    script: Path, tmp_path: Path, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(out: str) -> list[Any]:
        results = run_ranks(f"{BODIES}:page", 2, tmp_path, str(script), str(tmp_path / out))
        for path in (tmp_path / "store", *tmp_path.glob("result-*.json")):
            path.unlink(missing_ok=True)
        return results

    trained("whole")
    faults.arm("save.copied", "kill after=3")
    with monkeypatch.context() as killing:
        killing.setenv("STAGER_TEST_IS_KILLED", "yes")
        assert trained("broken") == [None, None]
    assert faults.fired("save.copied")
    assert trained("broken") == ["trained", "trained"]
    assert same(final(tmp_path / "whole"), final(tmp_path / "broken"))
    state = load_checkpoint(tmp_path / "broken/checkpoint/step-24").state  # in one process, whole
    parameters, moments = dict(state), state["optimizer"]
    made = final(tmp_path / "broken")[0]
    assert same({name: parameters[name] if name in parameters else moments[name] for name in made}, made)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("point", ["save.copied", "save.handed-over", "part.written", "commit.published"])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_script_by_itself_and_by_torchrun_resumes_bit_equal(
    script: Path, tmp_path: Path, faults: Faults, point: str, num_ranks: int
) -> None:
    """At a worker's point: first the worker is killed, and replaced; a save later, the trainer is."""
    resumes_from_any_point(Script(script, num_ranks), tmp_path, faults, point, 3)
