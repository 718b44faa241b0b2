"""Seconds that the Trainer's loop loses per save: ``python -m tests.integrations.compare_transformers DIRECTORY``.

Each round trains the same model with each way to save, and without saving. What a save costs is the time from its beginning
to the next one, less the time of as many steps without a save. The first save of a training is left out.
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


def _intervals(way: str, directory: Path, options: argparse.Namespace) -> tuple[list[float], float, int]:
    """Train once. Returns the seconds between saves, how long the end of the training took, and the bytes of the state."""
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
    WAYS[way]()(model, arguments, train_dataset=data, callbacks=[clock]).train()
    ended = time.perf_counter()
    shutil.rmtree(directory, ignore_errors=True)
    marks = clock.ends[options.every - 1 :: options.every]
    nbytes = 3 * sum(parameter.nbytes for parameter in model.parameters())
    return [after - before for before, after in itertools.pairwise(marks[1:])], ended - clock.ends[-1], nbytes


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
    taken: dict[str, list[float]] = {way: [] for way in WAYS}
    ends: dict[str, list[float]] = {way: [] for way in WAYS}
    nbytes = 0
    for _ in range(options.rounds):
        for way in WAYS:
            found, end, nbytes = _intervals(way, options.directory / "out", options)
            taken[way] += found
            ends[way].append(end)
    plain = statistics.median(taken["no save"])
    print(
        f"transformers {transformers.__version__}, torch {torch.__version__}, stager {__version__}, "
        f"Python {platform.python_version()}; {nbytes / 1e6:.0f} MB a checkpoint, a save every {options.every} steps of "
        f"{plain / options.every:.3f} s; {options.rounds} rounds of {_NUM_SAVES} saves"
    )
    for way, seconds in taken.items():
        lost = statistics.median(seconds) - plain
        print(f"{way:22} {lost:7.3f} s lost per save   {statistics.median(ends[way]):7.3f} s at the end of train()")
    theirs, ours = _log_secs()
    print(f"a log of {_LOG:,} entries: {theirs:.3f} s as the Trainer writes it, {ours:.3f} s as stager does")


if __name__ == "__main__":
    main()
