"""Seconds that the Trainer's loop loses per save: ``python -m tests.integrations.compare_transformers DIRECTORY``.

Each round trains the same model with each way to save, and without saving. What a save costs is the time from its beginning
to the next one, less the time of as many steps without a save; in the call is what ``_save_checkpoint()`` took of that. The
first save of a training is left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import platform
import shutil
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from stager.integrations.transformers import stager_trainer
from stager.integrations.transformers_parts.trainer_files import trainer_state_json
from stager.workers._version import __version__

_NUM_SAVES = 5
_LOG = 10_000
WAYS: dict[str, Callable[[], Any]] = {
    "no save": lambda: Trainer,
    "Trainer": lambda: Trainer,
    "stager": lambda: stager_trainer(Trainer),
}


class _Clock(TrainerCallback):
    """Notes when each step has ended, before the Trainer saves."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())


@dataclasses.dataclass
class _Taken:
    """Seconds: from each save to the next, in each call, and from the last step to the return of ``train()``."""

    between: list[float] = dataclasses.field(default_factory=list)
    in_call: list[float] = dataclasses.field(default_factory=list)
    at_end: list[float] = dataclasses.field(default_factory=list)


def _train(way: str, directory: Path, options: argparse.Namespace, taken: _Taken) -> int:
    """Train once, and add what it took. Returns the bytes of the state."""
    transformers.set_seed(0)
    shape = {"n_embd": options.width, "n_layer": options.layers, "n_head": 4, "n_positions": 64, "vocab_size": 1024}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, bos_token_id=0, eos_token_id=0))
    max_steps = options.every * (_NUM_SAVES + 1)
    arguments = TrainingArguments(
        str(directory),
        max_steps=max_steps,
        per_device_train_batch_size=options.batch,
        save_strategy="no" if way == "no save" else "steps",
        save_steps=options.every,
        save_total_limit=2,
        logging_strategy="no",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        log_level="error",
    )
    rows = torch.randint(0, 1024, (options.batch * max_steps, 64))
    clock = _Clock()
    data = [{"input_ids": row, "labels": row} for row in rows]
    trainer = WAYS[way]()(model, arguments, train_dataset=data, callbacks=[clock])
    in_call: list[float] = []
    save = trainer._save_checkpoint

    def timed_save(*args: Any, **kwargs: Any) -> None:
        started = time.perf_counter()
        save(*args, **kwargs)
        in_call.append(time.perf_counter() - started)

    trainer._save_checkpoint = timed_save
    trainer.train()
    ended = time.perf_counter()
    shutil.rmtree(directory, ignore_errors=True)
    marks = clock.ends[options.every - 1 :: options.every]
    nbytes = 3 * sum(parameter.nbytes for parameter in model.parameters())
    taken.between += [after - before for before, after in itertools.pairwise(marks[1:])]
    taken.in_call += in_call[1:]
    taken.at_end.append(ended - clock.ends[-1])
    return nbytes


def _log_secs() -> tuple[float, float]:
    """How long it takes to serialise a TrainerState with a long log: as the Trainer does it, and as stager does."""
    entry = {"loss": 1.25, "grad_norm": 0.5, "learning_rate": 1e-4, "epoch": 0.1}
    state = TrainerState(log_history=[{**entry, "step": step} for step in range(_LOG)])
    trainer = SimpleNamespace(state=state, control=TrainerControl(), callback_handler=SimpleNamespace(callbacks=[]))

    def theirs() -> object:
        return json.dumps(dataclasses.asdict(state), indent=2, sort_keys=True)

    return _median_secs(theirs), _median_secs(lambda: trainer_state_json(trainer))


def _median_secs(call: Callable[[], object]) -> float:
    taken = []
    for _ in range(9):
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def main() -> None:
    """Print a table of medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, help="where checkpoints are written; what is made there is removed")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--every", type=int, default=8, help="steps from one save to the next")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    os.environ["HF_HUB_OFFLINE"] = "1"
    taken = {way: _Taken() for way in WAYS}
    nbytes = 0
    for _ in range(options.rounds):
        for way in WAYS:
            nbytes = _train(way, options.directory / "out", options, taken[way])
    plain = statistics.median(taken["no save"].between)
    print(
        f"transformers {transformers.__version__}, torch {torch.__version__}, stager {__version__}, "
        f"Python {platform.python_version()}; {nbytes / 1e6:.0f} MB a checkpoint, a save every {options.every} steps of "
        f"{plain / options.every:.3f} s; {options.rounds} rounds of {_NUM_SAVES} saves"
    )
    for way in ("Trainer", "stager"):
        found = taken[way]
        lost = statistics.median(found.between) - plain
        in_call, at_end = statistics.median(found.in_call), statistics.median(found.at_end)
        print(
            f"{way:8} {lost:7.3f} s lost per save, {in_call:.3f} s of them in the call; {at_end:.3f} s at the end of train()"
        )
    theirs, ours = _log_secs()
    print(f"a log of {_LOG:,} entries: {theirs:.3f} s as the Trainer writes it, {ours:.3f} s as stager does")


if __name__ == "__main__":
    main()
