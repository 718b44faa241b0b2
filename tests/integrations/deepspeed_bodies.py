"""Trainings with DeepSpeed, in ranks of :func:`tests.staging.ranks.run_ranks`."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

from stager import ArgumentError, ConfigError, CorruptCheckpointError, RankFailedError, StorageError, UsageError
from stager.integrations.deepspeed import StagerCheckpointEngine, use, verify
from stager.workers.checkpoint.storage.posix import files
from tests.faults import faults_of_this_process
from tests.states import same

CONFIG: dict[str, Any] = {"workers": {"count": 1}, "persistence": {"fsync": False, "lock_timeout_secs": 20}}


def join(rank: int, num_ranks: int) -> None:
    """Be a rank as a launcher would start it. :func:`run_ranks` has made the process group."""
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE=str(num_ranks))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0")
    torch.set_num_threads(1)


class Training:
    """A small training: ``step()`` takes one batch, which is always the same in the same step."""

    def __init__(self, stage: int = 0, *, seed: int = 0, **config: Any) -> None:
        torch.manual_seed(seed)
        self.dtype = torch.float32 if stage == 0 else torch.bfloat16
        model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        self.engine, _, _, _ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            lr_scheduler=torch.optim.lr_scheduler.StepLR(optimizer, step_size=5),
            config={
                "train_micro_batch_size_per_gpu": 4,
                "zero_optimization": {"stage": stage},
                "zero_allow_untested_optimizer": True,
                "bf16": {"enabled": stage > 0},
                **config,
            },
        )

    def forward_and_backward(self) -> None:
        rows = torch.randn(4, 8, generator=torch.Generator().manual_seed(self.engine.global_steps))
        self.engine.backward(self.engine(rows.to(self.dtype)).float().square().mean())

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.forward_and_backward()
            self.engine.step()

    def made(self) -> dict[str, Any]:
        """What it has made so far, as copies."""
        inner = self.engine.basic_optimizer
        held = [parameter.data for group in inner.param_groups for parameter in group["params"]]
        states = [dict(state) for state in inner.state.values()]
        made: dict[str, Any] = clone(
            {
                "model": dict(self.engine.module.state_dict()),
                "masters": held,
                "states": states,
                "lr": self.engine.get_lr(),
                "steps": self.engine.global_steps,
            }
        )
        return made


def clone(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: clone(item) for key, item in value.items()}
    return [clone(item) for item in value] if isinstance(value, list) else value


def names(directory: str | Path) -> list[str]:
    """What is there beside what is hidden, and DeepSpeed's scripts."""
    return sorted(name for name in os.listdir(directory) if not name.startswith(".") and not name.endswith(".py"))


def latest(out: str) -> str | None:
    path = Path(out, "latest")
    return path.read_text() if path.exists() else None


# -- what is saved and loaded -----------------------------------------------------------------------------------------


def saved_and_loaded(rank: int, directory: str, out: str, num_ranks: int, stage: int) -> list[str]:
    """Save with stager; load it with stager, and with DeepSpeed's own engine. Returns the names in the tag."""
    join(rank, num_ranks)
    training = Training(stage)
    training.step(2)
    with use(training.engine, CONFIG) as checkpoints:
        assert training.engine.save_checkpoint(out, client_state={"mine": [1, 2]}) is True
        made = training.made()
        training.step()
        checkpoints.wait()
        assert latest(out) == "global_step2" and verify(Path(out, "global_step2")) == []

        again = Training(stage, seed=1)
        with use(again.engine, CONFIG):
            path, client_state = again.engine.load_checkpoint(out)
            assert path is not None and client_state["mine"] == [1, 2]
            assert same(again.made(), made)

    stock = Training(stage, seed=2)
    path, client_state = stock.engine.load_checkpoint(out)
    assert path is not None and client_state["mine"] == [1, 2]
    assert same(stock.made(), made)
    return names(Path(out, "global_step2"))


def loaded_from_deepspeed(rank: int, directory: str, out: str, num_ranks: int, stage: int) -> str:
    """What DeepSpeed's own engine has saved, stager's loads; and saves the next tag beside it."""
    join(rank, num_ranks)
    training = Training(stage)
    training.step(2)
    training.engine.save_checkpoint(out)
    made = training.made()
    again = Training(stage, seed=1)
    with use(again.engine, CONFIG):
        again.engine.load_checkpoint(out)
        assert same(again.made(), made)
        again.step()
        again.engine.save_checkpoint(out)
    assert names(out) == ["global_step2", "global_step3", "latest"]
    return str(latest(out))


def consolidated(rank: int, directory: str, out: str, num_ranks: int, stage: int) -> int:
    """``zero_to_fp32`` makes the same of stager's files as of DeepSpeed's."""
    join(rank, num_ranks)
    training = Training(stage)
    training.step(2)
    training.engine.save_checkpoint(f"{out}/stock")
    with use(training.engine, CONFIG):
        training.engine.save_checkpoint(f"{out}/ours")
    if rank != 0:
        return 0
    ours, stock = (dict(get_fp32_state_dict_from_zero_checkpoint(f"{out}/{name}")) for name in ("ours", "stock"))
    assert same({name: value.clone() for name, value in ours.items()}, {n: v.clone() for n, v in stock.items()})
    return len(ours)


# -- when -------------------------------------------------------------------------------------------------------------


def guarded(rank: int, directory: str, out: str, stage: int) -> bool:
    """The copy is held until the next backward pass is done; the step then waits for it."""
    join(rank, 1)
    training = Training(stage)
    training.step(2)
    with use(training.engine, CONFIG):
        faults = faults_of_this_process(Path(directory, "faults"))
        hold = faults.hold("save.overlapped")
        training.engine.save_checkpoint(out)
        made = training.made()
        training.forward_and_backward()
        hold.wait()  # the snapshot is not whole, and save_checkpoint() has returned
        hold.release()
        training.engine.step()
    again = Training(stage, seed=1)
    again.engine.load_checkpoint(out)
    return bool(same(again.made(), made))


def held(rank: int, directory: str, out: str) -> list[Any]:
    """Rank 1's file is not written yet: no rank sees the tag. Returns what ``latest`` was before and after."""
    join(rank, 2)
    training = Training(2)
    training.step()
    with use(training.engine, CONFIG) as checkpoints:
        training.engine.save_checkpoint(out)
        checkpoints.wait()
        dist.barrier()
        faults = faults_of_this_process(Path(directory, f"faults-{rank}"))
        hold = faults.hold("deepspeed.written") if rank == 1 else None
        training.step()
        training.engine.save_checkpoint(out)
        training.step()  # the loop goes on meanwhile
        if hold is not None:
            hold.wait()
        dist.barrier()
        seen = [names(out), latest(out)]
        dist.barrier()
        if hold is not None:
            hold.release()
        checkpoints.wait()
        return [*seen, names(out), latest(out)]


def failed(rank: int, directory: str, out: str) -> list[Any]:
    """Rank 1 cannot write: the tag appears nowhere, and every rank hears of it."""
    join(rank, 2)
    training = Training(2)
    training.step()
    faults = faults_of_this_process(Path(directory, f"faults-{rank}"))  # before the workers are started
    with use(training.engine, CONFIG) as checkpoints:
        training.engine.save_checkpoint(out)
        checkpoints.wait()
        training.step()
        if rank == 1:
            faults.arm("part.write", "errno ENOSPC")
        training.engine.save_checkpoint(out)
        problem = None
        try:
            checkpoints.wait()
        except (OSError, RankFailedError) as error:
            problem = type(error).__name__
        dist.barrier()
        seen = [names(out), latest(out), os.listdir(Path(out, ".stager", f"rank-{rank:05d}"))]
        training.engine.save_checkpoint(out, tag="later")
        checkpoints.wait()
        return [problem, *seen, latest(out)]


def replaced(rank: int, directory: str, out: str, can_exchange: bool) -> list[str]:
    """A tag is saved twice. What a user has put into it stays."""
    join(rank, 1)
    training = Training()
    if not can_exchange:
        files.exchange = lambda *_: False
    with use(training.engine, CONFIG) as checkpoints:
        training.step()
        training.engine.save_checkpoint(out, tag="same")
        checkpoints.wait()
        Path(out, "same", "notes.txt").write_text("mine")
        Path(out, "same", "zero_pp_rank_7_mp_rank_00_optim_states.pt").write_text("of a job with more ranks")
        training.step()
        training.engine.save_checkpoint(out, tag="same")
        made = training.made()
    again = Training(seed=1)
    with use(again.engine, CONFIG):
        again.engine.load_checkpoint(out, tag="same")
    assert same(again.made(), made) and verify(Path(out, "same")) == []
    return names(Path(out, "same"))


def killed_while_replacing(rank: int, directory: str, out: str, can_exchange: bool) -> None:
    """The fault that the test has armed kills this process while a tag is replaced that users have put files into."""
    join(rank, 1)
    training = Training()
    if not can_exchange:
        files.exchange = lambda *_: False
    with use(training.engine, CONFIG) as checkpoints:
        training.step()
        training.engine.save_checkpoint(out, tag="same")
        checkpoints.wait()
        put_into(Path(out, "same"))
        training.step()
        training.engine.save_checkpoint(out, tag="same")


def put_into(tag: Path) -> None:
    """Files of a user's. That of an older job is one of those that a new tag replaces."""
    Path(tag, "notes.txt").write_text("mine")
    Path(tag, "config").mkdir()
    Path(tag, "config", "a.json").write_text("{}")


def after_such_a_kill(rank: int, directory: str, out: str, call: str) -> list[Any]:
    """Load the tag, or save another one. Returns what is in the tag then, the step that it has, and what is in between."""
    join(rank, 1)
    training = Training(seed=1)
    with use(training.engine, CONFIG):
        if call == "save":
            training.engine.save_checkpoint(out, tag="other")
        path, _ = training.engine.load_checkpoint(out, tag="same")
        steps = training.engine.global_steps
    assert path is not None and verify(Path(out, "same")) == []
    assert Path(out, "same", "config", "a.json").read_text() == "{}"
    return [
        names(Path(out, "same")),
        steps,
        [name for name in names(Path(out, ".stager")) if not name.endswith(".json")],
    ]


def remains(rank: int, directory: str, out: str, num_ranks: int) -> list[Any]:
    """What a killed run of three ranks has left goes with the first save."""
    join(rank, num_ranks)
    for name in ("new-0123-5/global_step5", "rank-00000/0123-5-a.pt", "rank-00002/0123-5-c.pt"):
        Path(out, ".stager", name).mkdir(parents=True, exist_ok=True)
    dist.barrier()
    training = Training(2)
    training.step()
    with use(training.engine, CONFIG):
        training.engine.save_checkpoint(out)
    dist.barrier()
    found = sorted(str(path.relative_to(out)) for path in Path(out, ".stager").rglob("*") if path.is_dir())
    return [found, latest(out)]


def interrupted(rank: int, directory: str, out: str) -> list[str]:
    """A save that raised in the middle is taken back by the next one."""
    join(rank, 1)
    training = Training(2)
    training.step()
    with use(training.engine, CONFIG) as checkpoints:
        state_dict = training.engine.optimizer.state_dict
        training.engine.optimizer.state_dict = lambda: 1 / 0
        with contextlib.suppress(ZeroDivisionError):
            training.engine.save_checkpoint(out)
        training.engine.optimizer.state_dict = state_dict
        training.engine.save_checkpoint(out, tag="after")
        checkpoints.wait()
        assert latest(out) == "after" and verify(Path(out, "after")) == []
        assert names(Path(out, ".stager", "rank-00000")) == []
    return names(out)


def beside(rank: int, directory: str, out: str) -> list[Any]:
    """``save_16bit_model()`` returns when its file is there; ``save_latest=False`` leaves ``latest`` alone."""
    join(rank, 1)
    training = Training(1)
    training.step()
    with use(training.engine, CONFIG) as checkpoints:
        training.engine.save_16bit_model(out)
        weights = torch.load(Path(out, "pytorch_model.bin"))
        assert same(dict(weights), dict(training.engine.module.state_dict()))
        training.engine.save_checkpoint(out, save_latest=False)
        checkpoints.wait()
        return [names(out), names(Path(out, "global_step1"))]


def beside_elsewhere(rank: int, directory: str, out: str, elsewhere: str) -> dict[str, Any]:
    """``save_16bit_model()`` writes where the two paths together lead, as DeepSpeed's own engine does."""
    join(rank, 1)
    training = Training(1)
    training.step()
    engine, said = training.engine, {}
    with use(engine, CONFIG) as checkpoints:
        try:
            engine.save_16bit_model(out, "sub/m.bin")
        except StorageError as error:
            said["no directory"] = str(error)
        Path(out, "sub").mkdir()
        engine.save_checkpoint(out)
        checkpoints.wait()
        Path(out, "far").symlink_to(elsewhere)
        for name in ("sub/m.bin", "sub/m.pt", "global_step1/m.bin", "far/m.bin", f"{out}/absolute.bin", "../up.bin"):
            engine.save_16bit_model(out, name)
            weights = torch.load(os.path.join(out, name))
            assert same(dict(weights), dict(engine.module.state_dict())), name
        assert verify(Path(out, "global_step1")) == []  # one more file, and it is still the tag
        return {**said, "tag": names(Path(out, "global_step1")), "far": names(elsewhere), "latest": latest(out)}


def only_the_attribute(rank: int, directory: str, out: str) -> str | None:
    """Set ``engine.checkpoint_engine`` without ``use()``: DeepSpeed writes ``latest`` when the files are there."""
    join(rank, 2)
    training = Training(2)
    training.step()
    with StagerCheckpointEngine(CONFIG) as engine:
        training.engine.checkpoint_engine = engine
        training.engine.save_checkpoint(out)
        assert verify(Path(out, "global_step1")) == [] and len(names(Path(out, "global_step1"))) == 3
        return latest(out)


def damaged(rank: int, directory: str, out: str) -> list[str]:
    """A flipped byte is found before it is loaded, and named."""
    join(rank, 1)
    training = Training()
    with use(training.engine, CONFIG) as checkpoints:
        training.step()
        training.engine.save_checkpoint(out)
        training.step()
        training.engine.save_checkpoint(out)
        checkpoints.wait()
        path = Path(out, "global_step2", "mp_rank_00_model_states.pt")
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        said = [*verify(path.parent), *verify(path.parent, full=False)]
        try:
            training.engine.load_checkpoint(out)
        except CorruptCheckpointError as error:
            said.append(str(error))
        assert training.engine.load_checkpoint(out, tag="global_step1")[0] is not None
        path.unlink()
        said += verify(path.parent)
    return said


def universal(rank: int, directory: str, out: str, num_ranks: int) -> list[str]:
    """DeepSpeed's ``ds_to_universal`` reads stager's files as it reads its own. Returns the parameters that it made."""
    from argparse import Namespace

    from deepspeed.checkpoint.ds_to_universal import main as convert

    join(rank, num_ranks)
    training = Training(2)
    training.step(2)
    training.engine.save_checkpoint(f"{out}/stock", client_state={"universal_checkpoint_info": {}})
    with use(training.engine, CONFIG):
        training.engine.save_checkpoint(f"{out}/ours", client_state={"universal_checkpoint_info": {}})
    if rank != 0:
        return []
    for name in ("stock", "ours"):
        convert(
            Namespace(
                input_folder=f"{out}/{name}/global_step2",
                output_folder=f"{out}/{name}/universal",
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=False,
            )
        )
    found = sorted(
        str(path.relative_to(f"{out}/ours")) for path in Path(out, "ours", "universal", "zero").glob("*/*.pt")
    )
    for name in found:
        ours, stock = (torch.load(Path(out, kind, name), weights_only=False) for kind in ("ours", "stock"))
        assert same(ours, stock), name
    return found


# -- all ranks raise in the same call ---------------------------------------------------------------------------------


def raised(call: Callable[[], object]) -> str | None:
    """The type of what a call raises. Then all ranks meet: one that is out of step hangs until the group's timeout."""
    problem = None
    try:
        call()
    except Exception as error:  # noqa: BLE001  # the tests say which
        problem = type(error).__name__
    rounds: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(rounds, "the same")
    assert rounds == ["the same"] * dist.get_world_size()
    return problem


def broken_on(rank: int, where: str, out: str, checkpoints: StagerCheckpointEngine) -> Callable[[], None]:
    """Break something on one rank alone. Returns what mends it."""
    if where.startswith("save on") and rank == int(where[-1]):
        save = checkpoints.checkpointer.save

        def full(*_: Any, **__: Any) -> Any:
            raise StorageError(errno.ENOSPC, "no room", out)

        checkpoints.checkpointer.save = full
        return lambda: setattr(checkpoints.checkpointer, "save", save)
    blocked = {
        "scripts": Path(out, "zero_to_fp32.py"),
        "area of rank 1": Path(out, ".stager", "rank-00001"),
        "weights": Path(out, "pytorch_model.bin"),
    }
    if where in blocked and rank == 0:
        path = blocked[where]
        path.parent.mkdir(exist_ok=True)
        if where == "area of rank 1":
            path.write_text("no directory")
        else:
            path.mkdir()
        return path.unlink if where == "area of rank 1" else path.rmdir
    if where == "directory" and rank == 0:
        Path(out, "below").write_text("no directory")
        return Path(out, "below").unlink
    return lambda: None


def failed_alone(rank: int, directory: str, out: str, where: str, stage: int) -> list[Any]:
    """What one rank alone cannot do is raised by both in the same call, and the next save is published."""
    join(rank, 2)
    zero = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}
    training = Training(stage, zero_optimization=zero)
    training.step()
    engine, to = training.engine, f"{out}/below/tags" if where == "directory" else out
    with use(engine, CONFIG) as checkpoints:
        mend = broken_on(rank, where, out, checkpoints)
        dist.barrier()
        save = engine.save_16bit_model if where == "weights" else engine.save_checkpoint
        problem = raised(lambda: save(to))
        seen = latest(to)
        mend()
        dist.barrier()
        again = raised(lambda: engine.save_checkpoint(to))
        checkpoints.wait()
        assert verify(Path(to, "global_step1")) == []
        assert names(Path(to, ".stager", f"rank-{rank:05d}")) == []
        return [problem, seen, again, latest(to)]


def known_on_one_rank(rank: int, directory: str, out: str, failing: int, call: str) -> list[Any]:
    """Only one rank knows that a save has failed, and cannot say so: all raise that once, in the next call."""
    join(rank, 2)
    training = Training(2)
    training.step()
    engine = training.engine
    config = {
        **CONFIG,
        "persistence": {**CONFIG["persistence"], "on_save_error": "warn" if call == "warn" else "raise"},
    }
    with use(engine, config) as checkpoints:
        engine.save_checkpoint(out)
        checkpoints.wait()
        training.step()
        faults = faults_of_this_process(Path(directory, f"faults-{rank}"))
        if rank == failing:
            faults.arm("deepspeed.written", "errno ENOSPC")
        if call == "weights":  # waits itself
            return [raised(lambda: engine.save_16bit_model(out)), raised(lambda: engine.save_16bit_model(out))]
        engine.save_checkpoint(out)
        if rank == failing:
            checkpoints._in_flight.wait()  # and nobody looks at the error
        dist.barrier()
        then = engine.load_checkpoint if call == "load" else engine.save_checkpoint
        problems = [raised(lambda: then(out)), raised(lambda: engine.save_checkpoint(out, tag="later"))]
        checkpoints.wait()
        return [*problems, latest(out)]


def damaged_for_one(rank: int, directory: str, out: str, stage: int) -> list[Any]:
    """The file of one rank is damaged. Both are told so before they load, and load the older tag instead."""
    join(rank, 2)
    training = Training(stage)
    with use(training.engine, CONFIG) as checkpoints:
        for _ in range(2):
            training.step()
            training.engine.save_checkpoint(out)
        checkpoints.wait()
        dist.barrier()
        if rank == 0:
            (path,) = Path(out, "global_step2").glob("*zero_pp_rank_1_*optim_states.pt")
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
        dist.barrier()
    again = Training(stage, seed=1)
    with use(again.engine, CONFIG):
        problem = raised(lambda: again.engine.load_checkpoint(out))
        found = [raised(lambda: again.engine.load_checkpoint(out, tag="global_step1")), again.engine.global_steps]
        alone = []
        if stage < 3:  # DeepSpeed's ZeRO 3 reads the other files, too
            alone = [raised(lambda: again.engine.load_checkpoint(out, load_module_only=True))]
    return [problem, *found, *alone]


def differing_tags(rank: int, directory: str, out: str) -> list[Any]:
    join(rank, 2)
    training = Training(2)
    with use(training.engine, CONFIG):
        save = training.engine.save_checkpoint
        return [raised(partial(save, out, tag=tag)) for tag in (f"of-{rank}", "latest", "same")]


# -- what is refused --------------------------------------------------------------------------------------------------


def refused(rank: int, directory: str, out: str) -> dict[str, str]:
    join(rank, 1)
    training = Training()
    engine = training.engine
    said: dict[str, str] = {}

    def note(what: str, kind: type[Exception], call: Any) -> None:
        try:
            call()
        except kind as error:
            said[what] = str(error)

    note("model", UsageError, lambda: use(torch.nn.Linear(1, 1)))
    note("format", ConfigError, lambda: use(engine, {"persistence": {"format": "safetensors"}}))
    note("together", ConfigError, lambda: use(engine, {"ranks": {"together": True}}))
    note("dcp", ConfigError, lambda: use(engine, {"persistence": {"format": "dcp"}}))
    note("name", ConfigError, lambda: use(engine, {"persistence": {"name": "x-{step}"}}))
    note("links", ConfigError, lambda: use(engine, {"persistence": {"incremental": True}}))
    note("tolerated", ConfigError, lambda: use(engine, {"persistence": {"tolerate_failures": 2}}))
    note("no pickle", ConfigError, lambda: use(engine, {"loading": {"allow_pickle": False}}))
    note("skip", ConfigError, lambda: use(engine, {"arena": {"when_full": "skip"}}))
    engine._config.use_node_local_storage = True
    note("local", ConfigError, lambda: use(engine))
    engine._config.use_node_local_storage = False
    own = engine.checkpoint_engine
    engine.checkpoint_engine = object()
    note("writer", ConfigError, lambda: use(engine))
    engine.checkpoint_engine = own
    with use(engine, CONFIG) as checkpoints:
        note("twice", UsageError, lambda: use(engine))
        note("early", UsageError, lambda: checkpoints.save({}, f"{out}/a.pt"))
        note("no tag", ArgumentError, lambda: verify(directory))
    note("closed", Exception, lambda: engine.save_checkpoint(out))
    with use(engine, CONFIG) as checkpoints:  # a closed one may be followed by another
        engine.save_checkpoint(out)
        checkpoints.wait()
        Path(out, "a-file").write_text("mine")
        for tag in (
            "latest",
            "latest/a",
            "./latest",
            "latest_universal",
            ".stager",
            ".stager/a",
            "",
            ".",
            "..",
            "/a",
            "a-file",
        ):
            note(f"tag {tag}", ArgumentError, lambda tag=tag: engine.save_checkpoint(out, tag=tag))
        engine.save_16bit_model(out)  # and "latest" does not name what was refused
    assert latest(out) == "global_step0"
    assert names(out) == ["a-file", "global_step0", "latest", "pytorch_model.bin"]
    with use(engine, {**CONFIG, "loading": {"allow_pickle": True}, "persistence": {"format": "torch", "fsync": False}}):
        assert engine.load_checkpoint(out)[0] is not None
    return said


def page(rank: int, directory: str, script: str, out: str, num_ranks: int, stage: int) -> str:
    """Run the script of the page as one rank."""
    join(rank, num_ranks)
    dist.destroy_process_group, destroy = (lambda *_: None), dist.destroy_process_group  # run_ranks() destroys it
    names_: dict[str, Any] = {"__name__": "train"}
    try:
        exec(compile(Path(script).read_text(), script, "exec"), names_)
        names_["main"](out, stage)
    except Exception:
        if os.environ.get("STAGER_TEST_IS_KILLED") == "yes":  # where the other rank was, its launcher kills this one
            os.kill(os.getpid(), signal.SIGKILL)
        raise
    finally:
        dist.destroy_process_group = destroy
    return "trained"
