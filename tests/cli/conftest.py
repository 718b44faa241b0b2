from __future__ import annotations

import json
import shutil
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from stager import Checkpointer
from stager.cli import app

STEPS = (1, 20, 300)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are folded to ``COLUMNS``, and stager reads ``STAGER_*``: neither may come from whoever runs the tests."""
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.fixture(scope="session")
def saved_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run with checkpoints of ``STEPS``, made once. Not to be changed: take ``run`` for that."""
    directory = tmp_path_factory.mktemp("saved") / "run"
    weight = torch.arange(60_000, dtype=torch.float32).reshape(300, 200)
    state = {
        "model": OrderedDict(weight=weight, scale=torch.tensor(1.5), tied=weight),
        "data": {"order": [torch.arange(5), 7]},
        "a\x1b[31mred": torch.ones(2, dtype=torch.bfloat16),
    }
    with Checkpointer(directory) as checkpointer:
        for step in STEPS:
            checkpointer.save(step, state).upload_completion.result()  # one after the other: retention looks at times
    yield directory


@pytest.fixture
def run(saved_run: Path, tmp_path: Path) -> Path:
    """A copy of ``saved_run`` that the test may damage."""
    return Path(shutil.copytree(saved_run, tmp_path / "run"))


class Outcome:
    """What a command did: exit code, stdout, stderr."""

    def __init__(self, *arguments: object) -> None:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        self.code, self.out, self.err = result.exit_code, result.stdout, result.stderr

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def flip_bit(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)
