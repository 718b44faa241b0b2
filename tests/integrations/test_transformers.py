"""The Trainer of Hugging Face: what it saves with stager, whoever is killed meanwhile. docs/integrations/transformers.md."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stager import (
    CommittedEvent,
    Event,
    PathCheckpointer,
    PlannedEvent,
    StagerError,
    StateMismatchError,
    UsageError,
    export_checkpoint,
    load_checkpoint,
    verify,
)
from tests import scripts
from tests.faults import Faults
from tests.integrations.training import Ended, Training, final, page_script, resumes_bit_equal, resumes_from_any_point
from tests.staging.ranks import run_ranks
from tests.states import same

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers and accelerate warn of devices and their own code

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when it is imported
transformers = pytest.importorskip("transformers", reason="pip install 'stager[transformers]'")
pytest.importorskip("accelerate", reason="pip install 'stager[transformers]'")

from transformers.trainer_utils import get_last_checkpoint

from stager.integrations.transformers import StagerTrainerMixin, stager_trainer
from stager.integrations.transformers_parts import trainer_saves
from stager.integrations.transformers_parts.trainer_files import trainer_state_json
from stager.integrations.transformers_parts.trainer_leftovers import take_leftovers
from stager.integrations.transformers_parts.trainer_refusals import refuse_what_cannot_be_saved
from stager.integrations.transformers_parts.trainer_rotation import RotationRule, surplus
from tests.integrations.transformers_bodies import CONFIG, AfterSave, At, made_by, new_model, new_trainer

BODIES = "tests.integrations.transformers_bodies"


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread of torch, and none of tqdm, which never ends; one worker in the script of the page."""
    monkeypatch.setenv("STAGER_WORKERS__COUNT", "1")
    tqdm = pytest.importorskip("tqdm")
    monkeypatch.setattr(tqdm.tqdm, "monitor_interval", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def checkpoints(out: Path) -> list[str]:
    """What has the name of a checkpoint, whatever else is there."""
    names = [name for name in os.listdir(out) if name.startswith("checkpoint-")]
    return sorted(names, key=lambda name: int(name.removeprefix("checkpoint-")))


def last(out: Path) -> str | None:
    found = get_last_checkpoint(str(out)) if out.is_dir() else None
    return None if found is None else os.path.basename(found)


def state_of(out: Path, step: int) -> Any:
    return json.loads((out / f"checkpoint-{step}/trainer_state.json").read_text())


# -- what a checkpoint is --------------------------------------------------------------------------------------------


def test_a_checkpoint_is_whole_and_transformers_reads_an_export_of_its_weights(out: Path, tmp_path: Path) -> None:
    trainer = new_trainer(out, max_steps=3)
    trainer.train()
    assert checkpoints(out) == ["checkpoint-2", "checkpoint-3"]
    path = out / "checkpoint-3"
    report = verify(path)
    assert report.ok and not report.strangers
    loaded = load_checkpoint(path)
    assert loaded.step == 3 and set(loaded.state) == {"model", "optimizer", "scheduler", "rng"}
    files = {"config.json", "generation_config.json", "trainer_state.json", "training_args.bin"}
    assert set(loaded.files) == files and all((path / name).is_file() for name in files)
    assert torch.load(path / "training_args.bin", weights_only=False).save_steps == 2

    hub = tmp_path / "hub"
    hub.mkdir()
    export_checkpoint(path, hub / "model.safetensors", keys="model", strip_prefix="model.")
    shutil.copy(path / "config.json", hub)
    read, info = transformers.AutoModelForCausalLM.from_pretrained(hub, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert same(read.state_dict(), trainer.model.state_dict())


def test_the_state_of_the_trainer_is_what_the_trainer_itself_writes(out: Path, tmp_path: Path) -> None:
    """With two callbacks of one class, which export a state each."""
    early = [transformers.EarlyStoppingCallback(n) for n in (7, 8)]
    best: dict[str, Any] = {"load_best_model_at_end": True, "losses": [3.0, 2.0]}
    for stock, where in ((False, out), (True, tmp_path / "stock")):
        new_trainer(where, stock=stock, callbacks=early, max_steps=4, **best).train()
    ours, theirs = state_of(out, 2), state_of(tmp_path / "stock", 2)
    for one in (ours, theirs):
        one["best_model_checkpoint"] = os.path.basename(one["best_model_checkpoint"])
        for entry in one["log_history"]:
            entry.pop("eval_runtime", None)
        one["stateful_callbacks"]["EarlyStoppingCallback"] = one["stateful_callbacks"]["EarlyStoppingCallback"][-2:]
    assert ours == theirs


def test_a_long_log_is_serialised_without_work_in_python_for_each_entry() -> None:
    entry = {"loss": 1.25, "grad_norm": 0.5, "learning_rate": 1e-4, "epoch": 0.1}
    state = transformers.TrainerState(log_history=[{**entry, "step": n} for n in range(10_000)])
    trainer = SimpleNamespace(
        state=state, callback_handler=SimpleNamespace(callbacks=[]), control=transformers.TrainerControl()
    )
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        data = trainer_state_json(trainer)
    finally:
        sys.setprofile(None)
    assert calls < 500
    assert transformers.TrainerState(**json.loads(data)).log_history == state.log_history


def test_the_tokenizer_is_saved_and_read_again_only_when_it_has_changed(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.models.WordLevel({"a": 0, "b": 1, "<u>": 2}, unk_token="<u>")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(words), unk_token="<u>")
    times = []
    save = tokenizer.save_pretrained
    monkeypatch.setattr(tokenizer, "save_pretrained", lambda directory: times.append(1) or save(directory))
    grow = At(5, lambda: tokenizer.add_tokens(["c"]))
    trainer = new_trainer(out, max_steps=8, callbacks=[grow])
    trainer.processing_class = tokenizer
    trainer.train()
    assert len(times) == 2
    sizes = [len(transformers.AutoTokenizer.from_pretrained(out / name)) for name in checkpoints(out)]
    assert sizes == [3, 3, 4, 4]


# -- resuming --------------------------------------------------------------------------------------------------------


def test_it_resumes_bit_equal_in_the_middle_of_an_epoch_with_accumulated_gradients(out: Path, tmp_path: Path) -> None:
    more: dict[str, Any] = {"gradient_accumulation_steps": 2, "save_steps": 3}
    whole = new_trainer(tmp_path / "whole", stock=True, max_steps=9, **more)
    whole.train()
    new_trainer(out, max_steps=6, **more).train()
    resumed = new_trainer(out, max_steps=9, **more)
    resumed.train(resume_from_checkpoint=True)
    assert same(made_by(resumed), made_by(whole))
    again = new_trainer(out, max_steps=9, **more)
    again.train(resume_from_checkpoint=str(out / "checkpoint-3"))  # an earlier one; the later ones are replaced
    assert same(made_by(again), made_by(whole))
    assert checkpoints(out) == ["checkpoint-3", "checkpoint-6", "checkpoint-9"]


def test_it_resumes_from_a_checkpoint_of_the_stock_trainer_and_not_the_other_way_round(
    out: Path, tmp_path: Path
) -> None:
    whole = new_trainer(tmp_path / "whole", stock=True, max_steps=8)
    whole.train()
    new_trainer(out, stock=True, max_steps=4).train()
    resumed = new_trainer(out, max_steps=8, save_total_limit=2)
    resumed.train(resume_from_checkpoint=True)
    assert same(made_by(resumed), made_by(whole))
    assert checkpoints(out) == ["checkpoint-6", "checkpoint-8"]  # the stock ones are counted, and removed
    with pytest.raises(ValueError, match="valid checkpoint"):
        new_trainer(out, stock=True, max_steps=10).train(resume_from_checkpoint=True)


def test_there_is_nothing_to_resume_from(out: Path) -> None:
    with pytest.raises(ValueError, match="No valid checkpoint"):
        new_trainer(out, max_steps=2).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="valid checkpoint"):
        new_trainer(out, max_steps=2).train(resume_from_checkpoint=str(out / "checkpoint-7"))


def test_another_model_is_refused_before_anything_is_changed(out: Path) -> None:
    new_trainer(out, max_steps=2).train()
    config = transformers.GPT2Config(vocab_size=64, n_positions=8, n_embd=8, n_layer=2, n_head=1)
    other = transformers.GPT2LMHeadModel(config)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(StateMismatchError, match=r"h\.1\."):
        new_trainer(out, model=other, max_steps=4).train(resume_from_checkpoint=True)
    assert same(other.state_dict(), before)


def test_only_the_model_is_saved_and_resuming_says_what_begins_anew(
    out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = new_trainer(out, max_steps=2, save_only_model=True)
    first.train()
    assert set(load_checkpoint(out / "checkpoint-2").state) == {"model"}
    resumed = new_trainer(out, max_steps=2, save_only_model=True)
    with caplog.at_level(logging.WARNING, "stager"):
        resumed.train(resume_from_checkpoint=True)
    assert "begin anew" in caplog.text
    assert same(resumed.model.state_dict(), first.model.state_dict())


def test_the_scaler_of_mixed_precision_is_saved_and_loaded(out: Path) -> None:
    """As Accelerate makes one where it has a device: none is made on a CPU."""
    trainer, resumed = (new_trainer(out, max_steps=1, save_strategy="no") for _ in range(2))
    trainer.train()
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    trainer._save_checkpoint(trainer.model, trial=None)
    path = str(out / "checkpoint-1")
    resumed._load_scaler(path)  # there is none to fill
    resumed.accelerator.scaler = torch.amp.GradScaler("cpu")
    resumed._load_scaler(path)
    assert resumed.accelerator.scaler.get_scale() == 8.0


# -- commits ---------------------------------------------------------------------------------------------------------


def test_no_checkpoint_is_found_before_it_is_committed(out: Path, faults: Faults) -> None:
    """1. The worker is held before it commits step 2. 2. Steps 3 and 4 go on. 3. It goes on; step 4 is next."""
    found, events = [], []
    with faults.hold("commit.begin") as hold:

        def look() -> None:
            hold.wait()
            found.append((last(out), os.listdir(out)))
            hold.release()

        callbacks = [AfterSave(lambda step: events.append(("on_save", step))), At(3, look)]
        trainer = new_trainer(out, max_steps=4, callbacks=callbacks, on_event=events.append)
        trainer.train()
    (name, names) = found[0]
    assert name is None and any(one.startswith(".checkpoint-2.partial-") for one in names)
    assert checkpoints(out) == ["checkpoint-2", "checkpoint-4"]
    committed = [event for event in events if isinstance(event, CommittedEvent)]
    assert [os.path.basename(event.info.path) for event in committed] == ["checkpoint-2", "checkpoint-4"]
    assert events.index(("on_save", 2)) < events.index(committed[0])


def test_train_waits_for_what_a_killed_run_has_left(out: Path, faults: Faults, tmp_path: Path) -> None:
    """The process is killed when its workers have the snapshot of step 4, which they commit alone."""
    script = tmp_path / "train.py"
    script.write_text(f"import sys\nfrom {BODIES} import new_trainer\nnew_trainer(sys.argv[1], max_steps=8).train()\n")
    faults.arm("save.handed-over", "kill after=1")
    ended = Forked(script).run(out, check=False)
    assert ended.returncode == -signal.SIGKILL
    resumed = new_trainer(out, max_steps=8)
    seen = []
    load = resumed._load_from_checkpoint
    resumed._load_from_checkpoint = lambda path, *rest: seen.append(os.path.basename(path)) or load(path, *rest)
    resumed.train(resume_from_checkpoint=True)
    assert seen == ["checkpoint-4"]


def test_an_error_of_a_worker_is_raised_by_a_later_save_or_at_the_end(out: Path, faults: Faults) -> None:
    faults.arm("part.begin", "errno ENOSPC after=1")
    with pytest.raises(StagerError, match="No space left"):
        new_trainer(out, max_steps=4).train()
    assert checkpoints(out) == ["checkpoint-2"] and not list(out.glob(".*partial*"))


def test_the_best_checkpoint_was_not_committed_and_that_is_no_error(
    out: Path, faults: Faults, caplog: pytest.LogCaptureFixture
) -> None:
    faults.arm("part.begin", "errno ENOSPC after=1")
    config = {**CONFIG, "persistence": {**CONFIG["persistence"], "on_save_error": "warn"}}
    trainer = new_trainer(out, losses=[2.0, 1.0], load_best_model_at_end=True, max_steps=4, config=config)
    with caplog.at_level(logging.WARNING, "stager"):
        trainer.train()
    assert trainer.state.best_model_checkpoint is None and "was not committed" in caplog.text
    assert checkpoints(out) == ["checkpoint-2"]


def test_an_exception_in_training_comes_first_and_what_was_begun_is_committed(out: Path) -> None:
    def fail() -> None:
        raise KeyError("of the user's")

    with pytest.raises(KeyError, match="user's"):
        new_trainer(out, max_steps=8, callbacks=[At(5, fail)], save_total_limit=1).train()
    assert "checkpoint-4" in checkpoints(out)


def test_a_rank_that_fails_does_not_wait_for_parts_that_may_never_come(
    out: Path, faults: Faults, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trainer_saves, "_FAILING_SECS", 0.1)
    monkeypatch.setattr(trainer_saves, "_has_other_ranks", lambda: True)
    saves = trainer_saves.TrainerSaves(CONFIG, None)
    hold = faults.hold("part.write")  # never released: close() kills the worker
    saves.save(str(out / "checkpoint-2"), {"x": torch.ones(3)}, 2, {}, RotationRule(1, None))
    hold.wait()
    saves.finish_after(KeyError("of the user's"))
    assert not checkpoints(out) and "a save failed as well, after KeyError" in caplog.text


def test_an_optimizer_with_two_sets_of_weights_swaps_them_right_after_a_save(out: Path) -> None:
    """As schedule-free ones do: the Trainer calls ``eval()`` before an evaluation, and ``train()`` at the next step."""

    class Swaps(torch.optim.SGD):
        is_swapped = False

        def train(self) -> None:
            self.swap(False)

        def eval(self) -> None:
            self.swap(True)

        @torch.no_grad()  # type: ignore[untyped-decorator, unused-ignore]
        def swap(self, to: bool) -> None:
            if to is not self.is_swapped:
                self.is_swapped = to
                for parameter in self.param_groups[0]["params"]:
                    parameter.neg_()

    model = new_model()
    trainer = new_trainer(out, max_steps=6, eval_strategy="steps", eval_steps=2, model=model)
    trainer.optimizer = Swaps(model.parameters())
    trainer.train()
    assert checkpoints(out) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert not trainer.optimizer.optimizer._optimizer_step_pre_hooks


def test_a_checkpoint_that_is_saved_outside_of_train_is_committed_when_that_returns(out: Path) -> None:
    trainer = new_trainer(out, max_steps=1, save_strategy="no")
    trainer.train()
    trainer._save_checkpoint(trainer.model, trial=None)
    assert verify(out / "checkpoint-1").ok


# -- which ones stay -------------------------------------------------------------------------------------------------


def test_the_newest_and_the_best_stay(out: Path) -> None:
    trainer = new_trainer(out, losses=[2.0, 1.0, 4.0, 3.0, 5.0], save_total_limit=3, max_steps=10)
    trainer.train()
    assert checkpoints(out) == ["checkpoint-4", "checkpoint-8", "checkpoint-10"]


@pytest.mark.parametrize("limit", [1, 2])
def test_the_best_model_is_loaded_at_the_end_and_not_the_last(out: Path, limit: int) -> None:
    at_step_4 = {}
    trainer = new_trainer(
        out, losses=[2.0, 1.0, 4.0], load_best_model_at_end=True, save_total_limit=limit, max_steps=6, callbacks=[
            AfterSave(lambda step: at_step_4.update(copied(trainer.model)) if step == 4 else None)
        ],
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(out / "checkpoint-4")
    assert same(dict(trainer.model.state_dict()), at_step_4)
    assert checkpoints(out) == (["checkpoint-4"] if limit == 1 else ["checkpoint-4", "checkpoint-6"])


def test_the_last_save_is_the_best_and_its_state_says_so(out: Path, faults: Faults) -> None:
    """The worker is held until the state is serialised: nothing is at the path of the best one by then."""
    with faults.hold("commit.begin") as hold:
        trainer = new_trainer(out, losses=[2.0, 1.0], load_best_model_at_end=True, max_steps=4)
        opener = threading.Thread(target=lambda: (hold.wait(), hold.release()))
        opener.start()
        trainer.train()
        opener.join()
    assert state_of(out, 4)["best_model_checkpoint"] == str(out / "checkpoint-4")
    assert state_of(out, 2)["best_model_checkpoint"] == str(out / "checkpoint-2")


def test_only_better_ones_are_saved(out: Path) -> None:
    trainer = new_trainer(
        out, losses=[3.0, 4.0, 2.0, 5.0], save_strategy="best", load_best_model_at_end=True, max_steps=8
    )
    trainer.train()
    assert checkpoints(out) == ["checkpoint-2", "checkpoint-6"]
    assert trainer.state.best_model_checkpoint == str(out / "checkpoint-6")


@pytest.mark.remains
def test_what_was_committed_last_counts_as_newest(tmp_path: Path) -> None:
    for step in (2, 4, 10, 30):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}/trainer_state.json").touch()
    for name in (".checkpoint-40.partial-0123456789abcdef0", "checkpoint-50.tmp", "checkpoint-60"):
        (tmp_path / name).mkdir()

    def going(limit: int, best: int | None = None, *committed: int) -> list[int]:
        path = None if best is None else str(tmp_path / f"checkpoint-{best}")
        order = {str(tmp_path / f"checkpoint-{step}"): place for place, step in enumerate(committed)}
        return [int(one.rpartition("-")[2]) for one in surplus(str(tmp_path), RotationRule(limit, path), order)]

    assert going(2) == [2, 4]
    assert going(2, 2) == [4, 10]
    assert going(1, 2) == [4, 10]  # the best and the newest
    assert going(1, 30) == [2, 4, 10]
    assert going(9) == []
    assert going(2, None, 4) == [2, 10]  # the training went back to an earlier step
    assert going(1, None, 10, 4) == [2, 30, 10]
    assert surplus(str(tmp_path), RotationRule(3, "/elsewhere/checkpoint-2"), {}) == [str(tmp_path / "checkpoint-2")]


def test_what_cannot_be_removed_goes_after_the_next_commit(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a checkpoint that somebody reads."""
    delete, failed = PathCheckpointer.delete, []

    def fail_once(self: PathCheckpointer, path: str) -> Any:
        if not failed:
            failed.append(path)
            raise StagerError("somebody reads it")
        return delete(self, path)

    monkeypatch.setattr(PathCheckpointer, "delete", fail_once)
    new_trainer(out, max_steps=6, save_total_limit=1).train()
    assert [os.path.basename(path) for path in failed] == ["checkpoint-2"]
    assert checkpoints(out) == ["checkpoint-6"]


# -- what else there is of the Trainer -------------------------------------------------------------------------------


def test_a_path_that_is_about_to_be_saved_again_is_not_removed(out: Path, faults: Faults) -> None:
    """A training begins anew. A save waits for memory until an earlier one is committed, which the rotation follows."""
    begun = threading.Event()

    def on_event(event: Event) -> None:
        if isinstance(event, PlannedEvent) and event.step == 4:
            begun.set()

    rule, files = RotationRule(1, None), {"trainer_state.json": b"{}"}
    saves = trainer_saves.TrainerSaves(CONFIG, None)
    saves.save(str(out / "checkpoint-4"), {"x": torch.zeros(3)}, 4, files, rule)
    saves.finish()
    saves = trainer_saves.TrainerSaves(CONFIG | {"arena": {"buffers": 2}}, on_event)
    with faults.hold("part.write") as hold, ThreadPoolExecutor(1) as training:
        saves.save(str(out / "checkpoint-2"), {"x": torch.ones(3)}, 2, files, rule)
        saves.save(str(out / "checkpoint-3"), {"x": torch.ones(3)}, 3, files, rule)
        hold.wait()
        again = training.submit(saves.save, str(out / "checkpoint-4"), {"x": torch.ones(3)}, 4, files, rule)
        begun.wait()
        hold.release()
        again.result()
    saves.finish()
    assert checkpoints(out) == ["checkpoint-4"]
    assert same(load_checkpoint(out / "checkpoint-4").state, {"x": torch.ones(3)})


def test_a_rotation_that_is_late_removes_none_of_the_later_checkpoints(tmp_path: Path) -> None:
    """1. three saves are committed before the first one's turn comes 2. each turn knows nothing of the later ones."""
    for step in (4, 8, 12, 16):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    paths = {step: str(tmp_path / f"checkpoint-{step}") for step in (4, 8, 12, 16)}
    rule = RotationRule(1, None)
    assert surplus(str(tmp_path), rule, {paths[8]: 0}, [paths[12], paths[16]]) == [paths[4]]
    assert surplus(str(tmp_path), rule, {paths[8]: 0, paths[12]: 1}, [paths[16]]) == [paths[4], paths[8]]


def test_the_preemption_callback_returns_when_its_checkpoint_is_committed(out: Path, tmp_path: Path) -> None:
    whole = new_trainer(tmp_path / "whole", stock=True, max_steps=5, save_strategy="no")
    whole.train()

    def request() -> None:  # as its timer does, some seconds after the signal
        manager = next(one for one in trainer.callback_handler.callbacks if hasattr(one, "jit_manager")).jit_manager
        execute = manager.execute_jit_checkpoint

        def look() -> None:
            execute()
            found.append((last(out), verify(out / "checkpoint-3").ok))

        manager.execute_jit_checkpoint = look
        manager.is_checkpoint_requested = True

    found: list[Any] = []
    trainer = new_trainer(out, max_steps=5, save_strategy="no", enable_jit_checkpoint=True, callbacks=[At(3, request)])
    trainer.train()
    assert found == [("checkpoint-3", True)]
    assert not (out / "checkpoint-3/checkpoint-is-incomplete.txt").exists()
    resumed = new_trainer(out, max_steps=5, save_strategy="no")
    resumed.train(resume_from_checkpoint=True)
    assert same(resumed.model.state_dict(), whole.model.state_dict())


def test_a_file_that_a_trainer_has_put_into_the_directory_is_saved_with_it(out: Path) -> None:
    class Puts(transformers.Trainer):  # type: ignore[misc]
        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            path = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
            path.mkdir(parents=True)
            (path / "rollout_state.json").write_text(str(self.state.global_step))
            super()._save_checkpoint(model, trial)

    new_trainer(out, of=Puts, max_steps=4).train()
    assert [load_checkpoint(out / name).files["rollout_state.json"] for name in checkpoints(out)] == [b"2", b"4"]
    assert verify(out / "checkpoint-4", strict=True).ok


def test_what_else_lies_where_a_checkpoint_goes_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint-2"
    (path / "own").mkdir(parents=True)
    (path / "own/notes").touch()
    (path / "a.json").write_text("{}")
    (path / "checkpoint-is-incomplete.txt").touch()
    leftovers = take_leftovers(str(path))
    assert leftovers.files == {"a.json": b"{}"} and leftovers.is_preemption
    new_trainer(tmp_path, max_steps=2).train()
    (kept,) = tmp_path.glob(".checkpoint-2.not-a-checkpoint-*")
    assert (kept / "own/notes").exists() and verify(path, strict=True).ok
    assert not take_leftovers(str(path)).files and verify(path).ok


def test_weights_of_a_stock_trainer_that_was_killed_are_not_those_of_the_checkpoint(out: Path) -> None:
    path = out / "checkpoint-2"
    new_model().save_pretrained(path)
    new_trainer(out, max_steps=2).train()
    assert not (path / "model.safetensors").exists() and verify(path, strict=True).ok
    (kept,) = out.glob(".checkpoint-2.not-a-checkpoint-*")
    assert (kept / "model.safetensors").exists()


@pytest.mark.parametrize("first", ["the mixin", "the Trainer"])
def test_the_class_may_be_derived_by_hand(out: Path, first: str) -> None:
    class Own(transformers.Trainer):  # type: ignore[misc]
        pass

    events = []

    class Mine(*((StagerTrainerMixin, Own) if first == "the mixin" else (Own, StagerTrainerMixin))):  # type: ignore[misc]
        stager_config = CONFIG

        def stager_on_event(self, event: Any) -> None:
            events.append(type(event).__name__)

    new_trainer(out, of=Mine, stock=True, max_steps=2).train()
    assert verify(out / "checkpoint-2").ok and "CommittedEvent" in events
    with pytest.raises(UsageError, match="derived from transformers"):
        stager_trainer(dict)


def test_a_trial_of_a_search_saves_into_its_own_directory(out: Path) -> None:
    trainer = new_trainer(out, max_steps=2)
    trainer.hp_search_backend = transformers.trainer_utils.HPSearchBackend.OPTUNA
    trainer._hp_search_setup = lambda trial: None
    trainer.state.trial_name = trainer.hp_name = None
    trial = SimpleNamespace(number=7, params={})
    saved = trainer._get_output_dir(trial)
    trainer.hp_space = None
    with trainer._stager_open():
        trainer.create_optimizer_and_scheduler(2)
        trainer.state.global_step = 2
        trainer._save_checkpoint(trainer.model, trial)
    assert saved == str(out / "run-7") and verify(out / "run-7/checkpoint-2").ok


def arguments(**given: Any) -> SimpleNamespace:
    plain: dict[str, Any] = {
        "save_on_each_node": False,
        "push_to_hub": False,
        "hub_strategy": "every_save",
        "world_size": 1,
        "enable_jit_checkpoint": False,
    }
    return SimpleNamespace(**{**plain, **given})


@pytest.mark.parametrize(
    ("trainer", "args", "advice"),
    [
        ({"is_deepspeed_enabled": True}, {}, "without stager"),
        ({"is_fsdp_enabled": True}, {}, "'version': 2"),
        ({}, {"save_on_each_node": True}, "set it to False"),
        ({}, {"push_to_hub": True}, "hub_strategy='end'"),
        ({}, {"enable_jit_checkpoint": True, "world_size": 2}, "save more often"),
        ({"stager_config": {"ranks": {"together": False}}}, {"world_size": 2}, "leave it out"),
        ({}, {"push_to_hub": True, "hub_strategy": "end"}, None),
        ({}, {"enable_jit_checkpoint": True}, None),
    ],
    ids=["deepspeed", "fsdp1", "each-node", "hub", "jit-of-ranks", "not-together", "hub-end", "jit"],
)
def test_what_stager_cannot_save_is_refused_before_training(
    trainer: dict[str, Any], args: dict[str, Any], advice: str | None
) -> None:
    fsdp1 = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=1)))
    plain = {"is_deepspeed_enabled": False, "is_fsdp_enabled": False, "stager_config": None, "accelerator": fsdp1}
    refused = SimpleNamespace(args=arguments(**args), **{**plain, **trainer})
    if advice is None:
        refuse_what_cannot_be_saved(refused)
        return
    with pytest.raises(UsageError, match=advice):
        refuse_what_cannot_be_saved(refused)


# -- peft and TRL ----------------------------------------------------------------------------------------------------


def with_adapter(**more: Any) -> Any:
    peft = pytest.importorskip("peft", reason="pip install 'stager[integrations]'")
    model = new_model()
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], lora_dropout=0.1, fan_in_fan_out=True, **more)
    return peft.get_peft_model(model, config)


def test_only_adapters_are_saved_and_they_resume_bit_equal_and_peft_reads_an_export(out: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="pip install 'stager[integrations]'")
    whole = new_trainer(tmp_path / "whole", model=with_adapter(), stock=True, max_steps=6)
    whole.train()
    new_trainer(out, model=with_adapter(), max_steps=4).train()
    resumed = new_trainer(out, model=with_adapter(), max_steps=6, save_total_limit=1)
    resumed.train(resume_from_checkpoint=True)
    assert same(made_by(resumed), made_by(whole))
    loaded = load_checkpoint(out / "checkpoint-6")
    assert "model" not in loaded.state and "adapter_config.json" in loaded.files and "config.json" not in loaded.files

    hub = tmp_path / "hub"
    hub.mkdir()
    export_checkpoint(
        out / "checkpoint-6",
        hub / "adapter_model.safetensors",
        keys="adapters.default",
        strip_prefix="adapters.default.",
    )
    (hub / "adapter_config.json").write_bytes(loaded.files["adapter_config.json"])
    read = peft.PeftModel.from_pretrained(new_model(), hub)
    assert same(read.state_dict(), whole.model.state_dict())
    stock = tmp_path / "whole/checkpoint-6"
    from_stock = json.loads((stock / "adapter_config.json").read_text())
    assert json.loads(loaded.files["adapter_config.json"]).keys() == from_stock.keys()


def test_the_best_adapter_is_loaded_at_the_end(out: Path) -> None:
    at_step_2: dict[str, Any] = {}
    keep = AfterSave(lambda step: at_step_2.update(copied(trainer.model)) if step == 2 else None)
    trainer = new_trainer(
        out, model=with_adapter(), losses=[1.0, 2.0], load_best_model_at_end=True, max_steps=4, callbacks=[keep]
    )
    trainer.train()
    assert same(dict(trainer.model.state_dict()), at_step_2)


def test_adapters_of_other_names_or_configurations_are_refused(out: Path) -> None:
    new_trainer(out, model=with_adapter(), max_steps=2).train()
    peft = pytest.importorskip("peft")
    other = peft.get_peft_model(new_model(), peft.LoraConfig(r=2, target_modules=["c_attn"]), adapter_name="mine")
    with pytest.raises(StateMismatchError, match="mine"):
        new_trainer(out, model=other, max_steps=4).train(resume_from_checkpoint=True)
    wider = with_adapter(modules_to_save=["ln_f"])
    with pytest.raises(StateMismatchError, match="ln_f"):
        new_trainer(out, model=wider, max_steps=4).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("adapter", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_trainer_of_trl_resumes_bit_equal_and_writes_its_model_card(
    out: Path, tmp_path: Path, adapter: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # TRL imports it if it is there, and that leaves temporary files
    trl = pytest.importorskip("trl", reason="pip install 'stager[integrations]'")
    datasets = pytest.importorskip("datasets")
    tokenizers = pytest.importorskip("tokenizers")
    words = {f"w{n}": n for n in range(62)} | {"<p>": 62, "<e>": 63}
    base = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<p>"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=base, pad_token="<p>", eos_token="<e>")
    rows = torch.randint(0, 62, (40, 8), generator=torch.Generator().manual_seed(1)).tolist()

    def tuned(directory: Path, max_steps: int, *, stock: bool, resume: bool = False) -> Any:
        options = trl.SFTConfig(
            str(directory), max_steps=max_steps, per_device_train_batch_size=4, save_steps=2, report_to=[], bf16=False,
            disable_tqdm=True, use_cpu=True, learning_rate=1e-2, max_length=8, log_level="error", logging_steps=1,
            lr_scheduler_type="constant", gradient_checkpointing=False,
        )  # fmt: skip
        model = with_adapter(task_type="CAUSAL_LM") if adapter else new_model()
        made = trl.SFTTrainer if stock else stager_trainer(trl.SFTTrainer, config=CONFIG)
        data = datasets.Dataset.from_dict({"input_ids": rows})
        trainer = made(model, options, train_dataset=data, processing_class=tokenizer)
        trainer.train(resume_from_checkpoint=resume or None)
        return trainer

    whole = tuned(tmp_path / "whole", 6, stock=True)
    tuned(out, 4, stock=False)
    resumed = tuned(out, 6, stock=False, resume=True)
    assert same(resumed.model.state_dict(), whole.model.state_dict())
    assert (out / "README.md").is_file() and "tokenizer.json" in load_checkpoint(out / "checkpoint-6").files


# -- whoever is killed -----------------------------------------------------------------------------------------------


class Forked(Training):
    """The script, in processes that have imported transformers already."""

    def run(self, out: Path, *arguments: object, check: bool = True) -> Ended:
        source = f"import warnings\nwarnings.simplefilter('ignore')\n{self.script.read_text()}"
        with warnings.catch_warnings():
            ended = scripts.run(source, out, *arguments, modules=(BODIES,))
        assert not check or ended.returncode == 0, ended
        return Ended(ended.returncode, ended.stdout)


@pytest.fixture
def script(tmp_path: Path) -> Path:
    return page_script("transformers", tmp_path)


def test_killed_in_the_middle_of_a_save_it_resumes_bit_equal(script: Path, tmp_path: Path, faults: Faults) -> None:
    resumes_bit_equal(Forked(script), tmp_path, faults, "save.copied", 2)
    assert last(tmp_path / "broken") == "checkpoint-24"


def test_ddp_on_two_ranks_resumes_bit_equal(
    script: Path, tmp_path: Path, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(out: str) -> list[Any]:
        results = run_ranks(f"{BODIES}:page", 2, tmp_path, str(script), str(tmp_path / out))
        for path in (tmp_path / "store", *tmp_path.glob("result-*.json")):
            path.unlink(missing_ok=True)
        return results

    trained("whole")
    faults.arm("save.copied", "kill after=2")
    with monkeypatch.context() as killing:
        killing.setenv("STAGER_TEST_IS_KILLED", "yes")
        assert trained("broken") == [None, None]
    assert faults.fired("save.copied")
    assert trained("broken") == ["trained", "trained"]
    assert same(final(tmp_path / "whole"), final(tmp_path / "broken"))
    state = load_checkpoint(tmp_path / "broken/checkpoint-24").state
    assert set(state["rng"]) == {"rank-0", "rank-1"}


@pytest.mark.long
def test_shards_of_fsdp2_come_back_to_each_rank(tmp_path: Path) -> None:
    assert run_ranks(f"{BODIES}:sharded", 2, tmp_path) == [[True] * 4] * 2
    whole = load_checkpoint(tmp_path / "out/checkpoint-2").state["model"]
    assert whole["transformer.wte.weight"].shape == (64, 8)


@pytest.mark.long
@pytest.mark.parametrize("point", ["save.copied", "save.handed-over", "part.written", "commit.published"])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_script_by_itself_and_by_torchrun_resumes_bit_equal(
    script: Path, tmp_path: Path, faults: Faults, point: str, num_ranks: int
) -> None:
    """At a point of a worker: first the worker is killed, and replaced; a save later, the trainer is."""
    resumes_from_any_point(Training(script, num_ranks), tmp_path, faults, point, 2)


def copied(model: Any) -> dict[str, Any]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}
