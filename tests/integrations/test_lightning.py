"""Lightning: what its Trainer saves with stager, whoever is killed meanwhile. docs/integrations/lightning.md."""

from __future__ import annotations

import copy
import importlib
import logging
import os
import pickle
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stager import CheckpointNotFoundError, StorageError, UsageError, load_checkpoint, load_config
from stager.integrations.lightning_parts import writer
from stager.workers.checkpoint.documents.names import partial_name
from tests import scripts
from tests.faults import Faults
from tests.integrations.training import Ended, Training, final, page_script, resumes_bit_equal, resumes_from_any_point
from tests.staging.ranks import run_ranks
from tests.states import same

L = pytest.importorskip("lightning", reason="pip install 'stager[lightning]'")
pytest.importorskip("torchdata", reason="pip install torchdata")

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning warns of devices, loaders and its own code

CONFIG: dict[str, Any] = {"workers": {"count": 1}, "persistence": {"fsync": False, "lock_timeout_secs": 20}}
FRAMEWORKS = {"lightning": "lightning.pytorch", "pytorch_lightning": "pytorch_lightning"}
BODIES = "tests.integrations.lightning_bodies"


@dataclass(frozen=True)
class Framework:
    """One of the two packages, and stager's classes for it."""

    pl: Any
    ours: Any


@pytest.fixture(params=FRAMEWORKS)
def either(request: pytest.FixtureRequest) -> Framework:
    pl = pytest.importorskip(FRAMEWORKS[request.param])
    return Framework(pl, importlib.import_module(f"stager.integrations.{request.param}"))


@pytest.fixture
def framework() -> Framework:
    return Framework(L.pytorch, importlib.import_module("stager.integrations.lightning"))


def new_model(pl: Any) -> Any:
    class Small(pl.LightningModule):  # type: ignore[misc]
        def __init__(self, width: int = 8) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net = torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.Linear(width, 1))

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            loss: torch.Tensor = self.net(batch[0]).square().mean()
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.1)

    torch.manual_seed(0)
    return Small()


def fit(pl: Any, plugin: Any, callbacks: list[Any], max_steps: int, ckpt_path: Any = None, **more: Any) -> Any:
    """Train a new model on the same three batches, again and again. Returns the trainer."""
    data = torch.utils.data.TensorDataset(torch.randn(12, 4, generator=torch.Generator().manual_seed(1)))
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    plugins = [] if plugin is None else [plugin]
    quiet["enable_checkpointing"] = any(isinstance(one, pl.callbacks.ModelCheckpoint) for one in callbacks)
    model = more.pop("model", None) or new_model(pl)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_steps=max_steps, plugins=plugins, callbacks=callbacks, **quiet | more
    )
    trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=4), ckpt_path=ckpt_path)
    return trainer


def names(directory: Path) -> list[str]:
    """The checkpoints, whatever else is there."""
    return sorted(name for name in os.listdir(directory) if name.endswith(".ckpt") and not name.startswith("."))


# -- one process -----------------------------------------------------------------------------------------------------


def test_the_plugin_alone_will_do(either: Framework, tmp_path: Path) -> None:
    pl, io = either.pl, either.ours.StagerCheckpointIO(CONFIG)

    def every() -> Any:
        return pl.callbacks.ModelCheckpoint(dirpath=tmp_path / "a", filename="{step}", every_n_train_steps=3)

    whole = fit(pl, None, [], 9)
    fit(pl, io, [every()], 6)
    assert names(tmp_path / "a") == ["step=6.ckpt"] and os.path.isdir(tmp_path / "a/step=6.ckpt")
    resumed = fit(pl, io, [every()], 9, tmp_path / "a/step=6.ckpt")  # the same one again
    assert same(resumed.lightning_module.state_dict(), whole.lightning_module.state_dict())
    assert same(resumed.optimizers[0].state_dict(), whole.optimizers[0].state_dict())
    assert not io.stager_writer.is_open


def test_what_changes_after_save_is_not_in_the_checkpoint(framework: Framework, tmp_path: Path, faults: Faults) -> None:
    io = framework.ours.StagerCheckpointIO(CONFIG)
    live: dict[str, Any] = {"global_step": 7, "best": {"a": torch.ones(3)}, "list": [1, 2], "score": torch.zeros(())}
    with faults.hold("part.write") as hold:
        io.save_checkpoint(live, tmp_path / "new/a.ckpt")
        assert os.listdir(tmp_path / "new")  # the directory is there: ModelCheckpoint makes its link in it
        hold.wait()
        live["best"]["b"] = live["best"].pop("a").fill_(5)
        live["list"].append(3)
        live["score"].fill_(9)
        hold.release()
    loaded = io.load_checkpoint(tmp_path / "new/a.ckpt")  # waits for the save
    io.teardown()
    expected = {"global_step": 7, "best": {"a": torch.ones(3)}, "list": [1, 2], "score": torch.zeros(())}
    assert same(loaded, expected)
    assert load_checkpoint(tmp_path / "new/a.ckpt").step == 7


def test_last_is_overwritten_again_and_again_and_is_the_newest(framework: Framework, tmp_path: Path) -> None:
    every = framework.pl.callbacks.ModelCheckpoint(
        dirpath=tmp_path, every_n_train_steps=1, save_last=True, save_top_k=0
    )
    fit(framework.pl, framework.ours.StagerCheckpointIO(CONFIG), [every], 8)
    assert names(tmp_path) == ["last.ckpt"]
    assert load_checkpoint(tmp_path / "last.ckpt").state["global_step"] == 8
    goes_on = fit(framework.pl, framework.ours.StagerCheckpointIO(CONFIG), [every], 9, "last")
    assert goes_on.global_step == 9


def test_a_run_that_goes_on_with_stagers_class_knows_its_best_checkpoint(framework: Framework, tmp_path: Path) -> None:
    rule: dict[str, Any] = {"dirpath": tmp_path, "monitor": "loss", "every_n_train_steps": 1, "mode": "max"}
    first = framework.pl.callbacks.ModelCheckpoint(**rule)
    fit(framework.pl, framework.ours.StagerCheckpointIO(CONFIG), [first], 3)
    second = framework.ours.StagerModelCheckpoint(**rule)
    fit(framework.pl, framework.ours.StagerCheckpointIO(CONFIG), [second], 4, ckpt_path=first.best_model_path)
    assert second.best_model_score >= first.best_model_score and first.best_model_path in second.best_k_models


def test_link_names_the_newest_and_best_is_loaded(framework: Framework, tmp_path: Path) -> None:
    kinds: dict[str, Any] = {"monitor": "loss", "save_top_k": 2, "save_last": "link", "every_n_train_steps": 2}
    every = framework.ours.StagerModelCheckpoint(dirpath=tmp_path, filename="{step}", **kinds)
    fit(framework.pl, framework.ours.StagerCheckpointIO(CONFIG), [every], 10)
    assert os.path.islink(tmp_path / "last.ckpt") and len(names(tmp_path)) == 3
    assert load_checkpoint(tmp_path / "last.ckpt").state["global_step"] == 10
    assert sorted(map(os.path.basename, every.best_k_models)) == names(tmp_path)[1:]
    again = fit(framework.pl, framework.ours.StagerCheckpointIO(CONFIG), [every], 11, "best")
    assert again.global_step == 11


def test_loop_may_fit_test_and_fit_again_with_one_plugin(framework: Framework, tmp_path: Path) -> None:
    io = framework.ours.StagerCheckpointIO(CONFIG)
    for steps in (2, 4, 6):
        every = framework.pl.callbacks.ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=2, save_last=True)
        fit(framework.pl, io, [every], steps, "last")
        assert not io.stager_writer.is_open
    assert load_checkpoint(tmp_path / "last.ckpt").state["global_step"] == 6


@pytest.mark.parametrize("point", ["save.copied", "part.write"])
def test_last_that_was_never_committed_does_not_train_from_the_beginning(
    framework: Framework, tmp_path: Path, point: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A link that leads nowhere, and no "last" at all: what a kill before the commit leaves."""
    fit(
        framework.pl,
        framework.ours.StagerCheckpointIO(CONFIG),
        [framework.pl.callbacks.ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=2)],
        4,
    )
    if point == "save.copied":
        os.symlink("step=6.ckpt", tmp_path / "last.ckpt")
    os.mkdir(tmp_path / partial_name("step=6.ckpt", "0" * 16))
    every = framework.ours.StagerModelCheckpoint(
        dirpath=tmp_path, filename="{step}", every_n_train_steps=2, save_last="link"
    )
    with caplog.at_level(logging.WARNING, "stager"):
        trainer = fit(framework.pl, framework.ours.StagerCheckpointIO(CONFIG), [every], 6, "last")
    assert trainer.ckpt_path == str(tmp_path / "step=4.ckpt") and "the one before it" in caplog.text
    assert load_checkpoint(tmp_path / "last.ckpt").state["global_step"] == 6


def test_load_takes_lightnings_own_file_and_remove_removes_it(framework: Framework, tmp_path: Path) -> None:
    pl = framework.pl

    def every() -> Any:
        return pl.callbacks.ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=2,
                                            monitor="loss", mode="max")  # fmt: skip

    fit(pl, None, [every()], 6)
    assert all(os.path.isfile(tmp_path / name) for name in names(tmp_path))
    io = framework.ours.StagerCheckpointIO(CONFIG)
    fit(pl, io, [], 7, tmp_path / "step=6.ckpt")
    io.remove_checkpoint(tmp_path / "step=6.ckpt")
    io.remove_checkpoint(tmp_path / "nothing.ckpt")
    os.symlink("step=3.ckpt", tmp_path / "last.ckpt")
    io.remove_checkpoint(tmp_path / "last.ckpt")
    assert names(tmp_path) == ["step=3.ckpt"]
    os.mkdir(tmp_path / "mine.ckpt")
    io.remove_checkpoint(tmp_path / "mine.ckpt")  # no checkpoint: it stays
    assert names(tmp_path) == ["mine.ckpt", "step=3.ckpt"]


def test_load_from_checkpoint_takes_a_directory_and_a_file(either: Framework, tmp_path: Path) -> None:
    pl, model, expected = either.pl, new_model(either.pl), {}
    for name, config in {"dcp": {}, "torch": {"persistence": {"format": "torch"}}}.items():
        io = either.ours.StagerCheckpointIO(CONFIG | config)
        trainer = fit(pl, io, [], 2, model=model)
        trainer.save_checkpoint(tmp_path / f"{name}.ckpt")
        io.teardown()
        expected[name] = copy.deepcopy(model.state_dict())
    trainer = fit(pl, None, [], 2, model=model)
    trainer.save_checkpoint(tmp_path / "file.ckpt")
    expected["file"] = model.state_dict()
    kind = type(model)
    for name, state in expected.items():
        loaded = either.ours.load_from_checkpoint(kind, tmp_path / f"{name}.ckpt", map_location="cpu")
        assert loaded.hparams.width == 8 and same(loaded.state_dict(), state), name
    assert same(kind.load_from_checkpoint(tmp_path / "torch.ckpt/state.pt").state_dict(), expected["torch"])


def test_load_from_checkpoint_waits_for_a_save_that_is_in_flight(
    framework: Framework, tmp_path: Path, faults: Faults
) -> None:
    model = new_model(framework.pl)
    trainer = fit(framework.pl, framework.ours.StagerCheckpointIO(CONFIG), [], 1, model=model)
    with faults.hold("part.write") as hold, ThreadPoolExecutor(1) as thread:
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        hold.wait()
        loading = thread.submit(framework.ours.load_from_checkpoint, type(model), tmp_path / "a.ckpt")
        assert not loading.done()
        hold.release()
        assert same(loading.result().state_dict(), model.state_dict())
    trainer.strategy.teardown()
    with pytest.raises(CheckpointNotFoundError, match=r"b\.ckpt"):
        framework.ours.load_from_checkpoint(type(model), tmp_path / "b.ckpt")


def test_what_lightning_saves_for_itself_is_a_file_of_its_own(framework: Framework, tmp_path: Path) -> None:
    """``ddp_spawn`` hands the weights over in it, when the trainer has been torn down."""
    io = framework.ours.StagerCheckpointIO(CONFIG)
    weights = {"net.weight": torch.ones(3)}
    io.save_checkpoint(weights, tmp_path / "new/.temp.ckpt")
    assert (tmp_path / "new/.temp.ckpt").is_file() and not io.stager_writer.is_open
    assert same(io.load_checkpoint(tmp_path / "new/.temp.ckpt"), weights)
    io.remove_checkpoint(tmp_path / "new/.temp.ckpt")
    assert not any((tmp_path / "new").iterdir())


def test_the_tuner_goes_back_to_what_it_has_saved(
    framework: Framework, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pytest.importorskip("tqdm").tqdm, "monitor_interval", 0)  # a thread that never ends
    model = new_model(framework.pl)
    model.lr = 0.1
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen: list[bool] = []

    class Watch(framework.pl.Callback):  # type: ignore[misc, name-defined]
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            seen.append(same(dict(pl_module.state_dict()), before))

    finder = framework.pl.callbacks.LearningRateFinder(num_training_steps=4, early_stop_threshold=None)
    every = framework.pl.callbacks.ModelCheckpoint(dirpath=tmp_path / "run", filename="{step}", every_n_train_steps=2)
    io = framework.ours.StagerCheckpointIO(CONFIG)
    fit(framework.pl, io, [finder, Watch(), every], 2, model=model, default_root_dir=tmp_path)
    assert seen[-1] and names(tmp_path / "run") == ["step=2.ckpt"]
    assert not [name for name in os.listdir(tmp_path) if "lr_find" in name]


def test_fabric_saves_and_loads(framework: Framework, tmp_path: Path) -> None:
    io = framework.ours.StagerCheckpointIO(CONFIG)
    fabric = L.Fabric(accelerator="cpu", devices=1, plugins=[io])
    model = torch.nn.Linear(3, 3)
    fabric.save(tmp_path / "a.ckpt", {"model": model, "step": 3})
    state = {"model": torch.nn.Linear(3, 3), "step": 0}
    fabric.load(tmp_path / "a.ckpt", state)
    io.teardown()
    assert state["step"] == 3 and same(state["model"].state_dict(), model.state_dict())  # type: ignore[attr-defined]


# -- removing --------------------------------------------------------------------------------------------------------


def state_of(step: int) -> dict[str, Any]:
    return {"global_step": step, "state_dict": {"x": torch.full((1000,), float(step))}}


def test_the_old_one_goes_when_the_new_one_is_committed_and_not_before(
    framework: Framework, tmp_path: Path, faults: Faults
) -> None:
    io = framework.ours.StagerCheckpointIO(CONFIG)
    io.save_checkpoint(state_of(1), tmp_path / "1.ckpt")
    io.stager_writer.wait_for(tmp_path / "1.ckpt")
    with faults.hold("part.write") as hold:
        io.save_checkpoint(state_of(2), tmp_path / "2.ckpt")
        io.remove_checkpoint(tmp_path / "1.ckpt")
        hold.wait()
        assert names(tmp_path) == ["1.ckpt"]  # a kill here must leave one
        hold.release()
    io.teardown()
    assert names(tmp_path) == ["2.ckpt"]


def test_a_save_in_flight_that_is_replaced_and_removed_stays_removed(
    framework: Framework, tmp_path: Path, faults: Faults
) -> None:
    io = framework.ours.StagerCheckpointIO(CONFIG)
    with faults.hold("part.write") as hold:
        io.save_checkpoint(state_of(1), tmp_path / "1.ckpt")
        hold.wait()
        io.save_checkpoint(state_of(2), tmp_path / "2.ckpt")
        io.remove_checkpoint(tmp_path / "1.ckpt")
        assert io.stager_writer.is_in_flight(tmp_path / "1.ckpt")
        hold.release()
    io.teardown()
    assert names(tmp_path) == ["2.ckpt"]


def test_the_only_save_in_flight_is_cancelled_at_once(framework: Framework, tmp_path: Path, faults: Faults) -> None:
    """As the tuner does it: it saves, restores, and removes."""
    io = framework.ours.StagerCheckpointIO(CONFIG)
    with faults.hold("part.write") as hold, faults.hold("withdraw.synced") as withdrawn:
        io.save_checkpoint(state_of(1), tmp_path / "1.ckpt")
        hold.wait()
        removing = threading.Thread(target=io.remove_checkpoint, args=(tmp_path / "1.ckpt",))
        removing.start()
        withdrawn.wait()
        hold.release()
        withdrawn.release()
        removing.join()
    io.teardown()
    assert names(tmp_path) == []


def test_the_old_one_stays_until_a_later_save_replaces_the_failed_one(
    framework: Framework, tmp_path: Path, faults: Faults, caplog: pytest.LogCaptureFixture
) -> None:
    config = CONFIG | {"persistence": {"fsync": False, "on_save_error": "warn"}}
    io = framework.ours.StagerCheckpointIO(config)
    io.save_checkpoint(state_of(1), tmp_path / "1.ckpt")
    io.stager_writer.wait_for(tmp_path / "1.ckpt")
    faults.arm("part.write", "errno ENOSPC")
    io.save_checkpoint(state_of(2), tmp_path / "2.ckpt")
    io.stager_writer.wait_for(tmp_path / "2.ckpt")
    io.remove_checkpoint(tmp_path / "1.ckpt")
    assert names(tmp_path) == ["1.ckpt"]
    io.save_checkpoint(state_of(3), tmp_path / "3.ckpt")
    io.teardown()
    assert names(tmp_path) == ["3.ckpt"]
    faults.arm("part.write", "errno ENOSPC")
    io.save_checkpoint(state_of(4), tmp_path / "4.ckpt")
    io.remove_checkpoint(tmp_path / "3.ckpt")
    io.teardown()
    assert names(tmp_path) == ["3.ckpt"] and "was to be removed, and stays" in caplog.text


def test_a_path_that_is_saved_again_is_not_removed(framework: Framework, tmp_path: Path, faults: Faults) -> None:
    io = framework.ours.StagerCheckpointIO(CONFIG | {"arena": {"buffers": 3}})
    io.save_checkpoint(state_of(1), tmp_path / "best.ckpt")
    with faults.hold("part.write") as hold:
        io.save_checkpoint(state_of(2), tmp_path / "2.ckpt")
        hold.wait()
        io.remove_checkpoint(tmp_path / "best.ckpt")
        io.save_checkpoint(state_of(3), tmp_path / "best.ckpt")
        hold.release()
    io.teardown()
    assert names(tmp_path) == ["2.ckpt", "best.ckpt"]
    assert load_checkpoint(tmp_path / "best.ckpt").state["global_step"] == 3


def test_a_link_is_removed_and_not_what_it_leads_to(
    framework: Framework, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As ``save_last="link"`` asks for, where the name of the last one has a step."""
    io = framework.ours.StagerCheckpointIO(CONFIG)
    io.save_checkpoint(state_of(1), tmp_path / "1.ckpt")
    io.stager_writer.wait_for(tmp_path / "1.ckpt")
    (tmp_path / "1-last.ckpt").symlink_to("1.ckpt")
    io.remove_checkpoint(tmp_path / "1-last.ckpt")
    io.teardown()
    assert names(tmp_path) == ["1.ckpt"] and not caplog.records


# -- Slurm, signals, errors ------------------------------------------------------------------------------------------


def test_what_slurm_asks_for_is_committed_when_save_returns(framework: Framework, tmp_path: Path) -> None:
    io = framework.ours.StagerCheckpointIO(CONFIG)
    io.save_checkpoint(state_of(1), tmp_path / "hpc_ckpt_1.ckpt")
    assert names(tmp_path) == ["hpc_ckpt_1.ckpt"]
    io.teardown()


def test_the_checkpoint_of_slurm_is_found_beside_an_unfinished_one(framework: Framework, tmp_path: Path) -> None:
    pl, io = framework.pl, framework.ours.StagerCheckpointIO(CONFIG)
    trainer = fit(pl, io, [], 3)
    trainer.save_checkpoint(tmp_path / "hpc_ckpt_1.ckpt")
    io.teardown()
    os.mkdir(tmp_path / partial_name("hpc_ckpt_2.ckpt", "12" * 8))
    resumed = fit(pl, io, [], 4, "hpc", default_root_dir=tmp_path)
    assert resumed.global_step == 4 and names(tmp_path) == ["hpc_ckpt_1.ckpt"]
    os.rename(tmp_path / "hpc_ckpt_1.ckpt", tmp_path / "elsewhere.ckpt")
    os.mkdir(tmp_path / partial_name("hpc_ckpt_2.ckpt", "12" * 8))
    with pytest.raises(StorageError, match="killed while it saved this checkpoint"):
        fit(pl, io, [], 4, "hpc", default_root_dir=tmp_path)


def test_a_signal_handler_may_save_while_a_save_is_made(
    framework: Framework, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    io = framework.ours.StagerCheckpointIO(CONFIG)
    makedirs = os.makedirs

    def interrupted(*arguments: Any, **options: Any) -> None:
        monkeypatch.setattr(os, "makedirs", makedirs)
        io.save_checkpoint(state_of(2), tmp_path / "hpc_ckpt_1.ckpt")
        makedirs(*arguments, **options)

    monkeypatch.setattr(os, "makedirs", interrupted)
    io.save_checkpoint(state_of(1), tmp_path / "1.ckpt")
    io.teardown()
    assert names(tmp_path) == ["1.ckpt", "hpc_ckpt_1.ckpt"]


def test_an_error_in_the_background_is_raised_once(framework: Framework, tmp_path: Path, faults: Faults) -> None:
    io = framework.ours.StagerCheckpointIO(CONFIG)
    every = framework.pl.callbacks.ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=2, save_top_k=-1)
    faults.arm("part.write", "errno ENOSPC")
    with pytest.raises(StorageError, match="No space left on device"):
        fit(framework.pl, io, [every], 8)
    assert not io.stager_writer.is_open
    every = framework.pl.callbacks.ModelCheckpoint(dirpath=tmp_path / "again", every_n_train_steps=2)
    fit(framework.pl, io, [every], 4)
    assert len(names(tmp_path / "again")) == 1


def test_an_error_in_training_comes_first(
    framework: Framework, tmp_path: Path, faults: Faults, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(framework.pl.Callback):  # type: ignore[misc, name-defined]
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 2:
                raise RuntimeError("of the training")

    io = framework.ours.StagerCheckpointIO(CONFIG)
    every = framework.pl.callbacks.ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=2)
    faults.arm("part.write", "errno ENOSPC")
    with pytest.raises(RuntimeError, match="of the training"):
        fit(framework.pl, io, [Broken(), every], 8)
    assert "a save failed as well" in caplog.text


def test_a_rank_that_fails_does_not_wait_for_others_though_a_removal_does(
    framework: Framework,
    tmp_path: Path,
    faults: Faults,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(writer, "_FAILING_SECS", 0.1)
    one = writer.CheckpointWriter(load_config(CONFIG), None)
    one.save(tmp_path / "1.ckpt", state_of(1))
    one.wait_for(tmp_path / "1.ckpt")
    hold = faults.hold("part.write")  # never released: close() kills the worker
    one.save(tmp_path / "2.ckpt", state_of(2))
    one.remove(tmp_path / "1.ckpt")
    hold.wait()
    try:
        pytest.fail("training failed")
    except pytest.fail.Exception:
        one.close()
    assert names(tmp_path) == ["1.ckpt"] and "was to be removed, and stays" in caplog.text


def test_wrong_arguments_are_told(framework: Framework, tmp_path: Path) -> None:
    ours = framework.ours
    with pytest.raises(UsageError, match="retention has rules"):
        ours.StagerCheckpointIO({"retention": {"keep_latest": 1}})
    io = ours.StagerCheckpointIO(CONFIG)
    with pytest.raises(UsageError, match="storage_options"):
        io.save_checkpoint(state_of(1), tmp_path / "a.ckpt", storage_options={})
    with pytest.raises(UsageError, match="give a device"):
        io.load_checkpoint(tmp_path / "a.ckpt", map_location=lambda storage, _: storage)
    with pytest.raises(StorageError, match=r"a\.ckpt"):
        io.load_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(UsageError, match="s3"):
        io.save_checkpoint(state_of(1), "s3://bucket/a.ckpt")
    io.teardown()
    assert pickle.loads(pickle.dumps(io)).stager_writer.config == io.stager_writer.config
    with pytest.raises(UsageError, match="saves shards"):
        ours.StagerModelParallelStrategy(save_distributed_checkpoint=False)


# -- callbacks -------------------------------------------------------------------------------------------------------


def test_forward_and_backward_run_while_the_snapshot_is_taken(
    framework: Framework, tmp_path: Path, faults: Faults
) -> None:
    """The copy is held until the next backward pass is done. An optimizer that did not wait then would change it."""
    hold = faults.hold("save.overlapped")
    held: list[dict[str, Any]] = []

    class Watch(framework.pl.Callback):  # type: ignore[misc, name-defined]
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 2:
                held.append({name: value.clone() for name, value in pl_module.state_dict().items()})

        def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
            if trainer.global_step == 2:
                hold.wait()
                hold.release()

    every = framework.pl.callbacks.ModelCheckpoint(
        dirpath=tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1
    )
    io = framework.ours.StagerCheckpointIO(CONFIG)
    fit(framework.pl, io, [Watch(), framework.ours.StagerGuard(), every], 4)
    assert names(tmp_path) == ["step=2.ckpt", "step=4.ckpt"]
    assert same(dict(load_checkpoint(tmp_path / "step=2.ckpt").state["state_dict"]), held[0])


def test_guard_waits_before_callbacks_that_come_earlier_in_the_list(framework: Framework, tmp_path: Path) -> None:
    """Lightning's averages of weights are swapped in there."""
    waits: list[str] = []
    seen: list[tuple[str, int]] = []

    class Swaps(framework.pl.Callback):  # type: ignore[misc, name-defined]
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            seen.append(("epoch", len(waits)))

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            seen.append(("end", len(waits)))

    class Watched(framework.ours.StagerGuard):  # type: ignore[misc, name-defined]
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            waits.append("epoch")
            super().on_train_epoch_start(trainer, pl_module)

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            waits.append("end")
            super().on_train_end(trainer, pl_module)

    callbacks = [framework.pl.callbacks.RichModelSummary(), Swaps(), Watched()]
    fit(framework.pl, framework.ours.StagerCheckpointIO(CONFIG), callbacks, 4, default_root_dir=tmp_path)
    assert seen == [("epoch", 1), ("epoch", 2), ("end", 3)]


@pytest.mark.parametrize("name", ["StagerGuard", "StagerModelCheckpoint"])
def test_a_strategy_that_would_not_load_the_checkpoint_is_refused(framework: Framework, name: str) -> None:
    pl, ours = framework.pl, framework.ours
    strategy = pl.strategies.ModelParallelStrategy(save_distributed_checkpoint=False)
    strategy.checkpoint_io = ours.StagerCheckpointIO(CONFIG)
    trainer = SimpleNamespace(strategy=strategy)
    with pytest.raises(UsageError, match="ModelParallelStrategy loads checkpoints without asking"):
        getattr(ours, name)().setup(trainer, None, "fit")


def test_guard_that_can_guard_nothing_says_so(framework: Framework) -> None:
    pl, ours = framework.pl, framework.ours
    with pytest.raises(UsageError, match="saves with stager"):
        fit(pl, None, [ours.StagerGuard()], 1)
    model = new_model(pl)
    model.configure_optimizers = lambda: None
    with pytest.raises(UsageError, match="no optimizer"):
        fit(pl, ours.StagerCheckpointIO(CONFIG), [ours.StagerGuard()], 1, model=model)


def test_lightnings_wrapper_of_an_optimizer_is_seen_through(framework: Framework) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    wrapper = L.pytorch.core.optimizer.LightningOptimizer(optimizer)
    io = framework.ours.StagerCheckpointIO(CONFIG)
    io.stager_writer.guard([wrapper])
    assert len(optimizer._optimizer_step_pre_hooks) == 1  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match="takes torch optimizers"):
        io.stager_writer.guard([object()])
    io.teardown()
    assert not optimizer._optimizer_step_pre_hooks  # type: ignore[attr-defined]


def test_loggers_hear_of_a_checkpoint_when_it_is_durable(either: Framework, tmp_path: Path, faults: Faults) -> None:
    told: list[tuple[int, bool, bool]] = []
    pl = either.pl

    class Recorder(pl.loggers.Logger):  # type: ignore[misc, name-defined]
        name, version = "recorder", 0

        def log_metrics(self, *_: Any, **__: Any) -> None: ...

        def log_hyperparams(self, *_: Any, **__: Any) -> None: ...

        def after_save_checkpoint(self, callback: Any) -> None:
            named = [callback.best_model_path, callback.last_model_path, *callback.best_k_models]
            is_main = threading.current_thread() is threading.main_thread()
            told.append((trainer_steps[-1], is_main, all(map(os.path.exists, filter(None, named)))))

    trainer_steps = [0]

    class Watch(pl.Callback):  # type: ignore[misc, name-defined]
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            trainer_steps.append(trainer.global_step)
            if trainer.global_step == 3:
                hold.wait()
                hold.release()
                trainer.strategy.checkpoint_io.stager_writer.wait_for(tmp_path / "step=2.ckpt")

    every = either.ours.StagerModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    with faults.hold("part.write") as hold:
        io = either.ours.StagerCheckpointIO(CONFIG)
        fit(pl, io, [Watch(), every], 4, logger=Recorder())
    assert told == [(3, True, True), (3, True, True)]  # of step 2: at step 3, not before; of step 4: when the fit ended


def test_random_states_go_on_and_their_absence_is_told(
    framework: Framework, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    drawn: list[float] = []

    class Draw(framework.pl.Callback):  # type: ignore[misc, name-defined]
        def on_train_batch_end(self, *_: Any) -> None:
            drawn.append(torch.rand(()).item())

    every = framework.pl.callbacks.ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=3, filename="{step}")
    io, ours = framework.ours.StagerCheckpointIO(CONFIG), framework.ours
    fit(framework.pl, io, [Draw(), ours.StagerRandomState(), every], 6)
    expected = torch.rand(3).tolist()
    torch.manual_seed(77)
    drawn.clear()
    fit(framework.pl, io, [ours.StagerRandomState(), Draw()], 9, tmp_path / "step=6.ckpt")
    assert drawn == expected
    fit(framework.pl, io, [framework.pl.callbacks.ModelCheckpoint(dirpath=tmp_path / "b", filename="b")], 12)
    fit(framework.pl, io, [ours.StagerRandomState()], 13, tmp_path / "b/b.ckpt")
    assert "has no random states" in caplog.text


# -- killed ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Forked(Training):
    """The script, in processes that have imported Lightning already."""

    def run(self, out: Path, *arguments: object, check: bool = True) -> Ended:
        source = f"import warnings\nwarnings.simplefilter('ignore')\n{self.script.read_text()}"
        modules = ("lightning.pytorch", "torchdata.stateful_dataloader", "stager.integrations.lightning")
        with warnings.catch_warnings():
            ended = scripts.run(source, out, *arguments, modules=modules)
        assert not check or ended.returncode == 0, ended
        return Ended(ended.returncode, ended.stdout)


@pytest.fixture
def script(tmp_path: Path) -> Path:
    return page_script("lightning", tmp_path)


def test_killed_in_the_middle_of_a_save_it_resumes_bit_equal(script: Path, tmp_path: Path, faults: Faults) -> None:
    resumes_bit_equal(Forked(script), tmp_path, faults, "save.copied", 2)
    assert os.path.realpath(tmp_path / "broken/last.ckpt").endswith("step=20.ckpt")


def _ranks_resume_bit_equal(tmp_path: Path, faults: Faults, monkeypatch: pytest.MonkeyPatch, *call: Any) -> list[Any]:
    """Two ranks: 1. one run without interruption 2. one that is killed 3. it goes on. Compares what was made."""
    body, point, arguments = call
    target = f"{BODIES}:{body}"
    run_ranks(target, 2, tmp_path, *arguments, str(tmp_path / "whole"))
    (tmp_path / "store").unlink(missing_ok=True)
    faults.arm(point, "kill after=2")
    monkeypatch.setenv("STAGER_TEST_IS_KILLED", "yes")
    for result in tmp_path.glob("result-*.json"):
        result.unlink()
    killed = run_ranks(target, 2, tmp_path, *arguments, str(tmp_path / "broken"))
    assert faults.fired(point) and killed == [None, None]
    monkeypatch.delenv("STAGER_TEST_IS_KILLED")
    (tmp_path / "store").unlink(missing_ok=True)
    resumed = run_ranks(target, 2, tmp_path, *arguments, str(tmp_path / "broken"))
    for result in tmp_path.glob("result-*.json"):
        result.unlink()
    (tmp_path / "store").unlink(missing_ok=True)
    return resumed


def test_ddp_on_two_ranks_resumes_bit_equal(
    script: Path, tmp_path: Path, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    _ranks_resume_bit_equal(tmp_path, faults, monkeypatch, "page", "save.copied", [str(script)])
    assert same(final(tmp_path / "whole"), final(tmp_path / "broken"))


@pytest.mark.parametrize(
    "point", ["save.copied", *(pytest.param(p, marks=pytest.mark.long) for p in ("save.handed-over", "save.planned"))]
)
def test_fsdp2_on_two_ranks_resumes_bit_equal_and_lightning_reads_it(
    tmp_path: Path, faults: Faults, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    resumed = _ranks_resume_bit_equal(tmp_path, faults, monkeypatch, "sharded", point, [])
    for rank in range(2):
        made = [torch.load(tmp_path / out / f"final-{rank}.pt") for out in ("whole", "broken")]
        assert same(*made), rank
    # What was committed by then: workers of a busy host may be two saves behind.
    assert any(f"step={step}.ckpt" in resumed[0] for step in (6, 12, 18))
    if point == "save.copied":
        from stager.integrations.lightning import load_from_checkpoint
        from tests.integrations.lightning_bodies import Sharded

        assert run_ranks(f"{BODIES}:stock_goes_on", 2, tmp_path, str(tmp_path / "broken")) == [14, 14]
        whole = load_from_checkpoint(Sharded, tmp_path / "broken/ckpt/last.ckpt").state_dict()
        (rank_0, rank_1) = (torch.load(tmp_path / f"broken/final-{rank}.pt")["model"] for rank in range(2))
        assert same(list(whole.values()), [torch.cat(parts) for parts in zip(rank_0, rank_1, strict=True)])


@pytest.mark.long
def test_fsdp2_takes_lightnings_own_shards_and_other_numbers_of_ranks(tmp_path: Path) -> None:
    assert run_ranks(f"{BODIES}:goes_on_from_stock", 2, tmp_path, str(tmp_path)) == [9, 9]
    (tmp_path / "store").unlink(missing_ok=True)
    newest = tmp_path / "mixed/step=9.ckpt"
    (loaded,) = run_ranks(f"{BODIES}:loads_on_one_rank", 1, tmp_path, str(newest))
    saved = load_checkpoint(newest, keys="state_dict").state["state_dict"]
    assert loaded == [value.tolist() for value in saved.values()]


@pytest.mark.long
@pytest.mark.parametrize(
    "point", ["save.copied", "save.handed-over", "save.planned", "part.written", "commit.published"]
)
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_script_by_itself_and_by_torchrun_resumes_bit_equal(
    script: Path, tmp_path: Path, faults: Faults, point: str, num_ranks: int
) -> None:
    """At a point of a worker: first the worker is killed, and replaced; a save later, the trainer is."""
    resumes_from_any_point(Training(script, num_ranks), tmp_path, faults, point, 2)
