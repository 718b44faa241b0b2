"""Demos small enough for the suite, and torch's global settings put back after each test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from stager.demo import DemoConfig, DemoSettings, RanksConfig
from stager.demo.chart import draw_chart
from stager.demo.results import Results
from stager.state.rng_state import RngState
from tests import prepared_workers

TINY: dict[str, Any] = {
    "steps": 24,
    "save_every": 3,
    "kill_staging_at_save": 3,
    "kill_writing_at_save": 5,
    "batch_size": 2,
    "block_size": 16,
    "n_layer": 1,
    "n_head": 2,
    "n_embd": 64,
    "warmup_steps": 3,
    "num_threads": 1,
    "measure_saves": 1,
    "measure_steps": 2,
}

TINY_ON_RANKS: dict[str, Any] = {
    "steps": 24,
    "save_every": 2,
    "batch_size": 2,
    "block_size": 16,
    "n_layer": 1,
    "n_head": 2,
    "n_embd": 64,
    "dropout_steps": 16,
    "warmup_steps": 2,
    "kill_writing_at_save": 2,
    "kill_staging_at_save": 4,
    "other_ranks": [1],
}


@pytest.fixture(scope="package", autouse=True)
def workers_of_programs_are_fresh() -> Iterator[None]:
    """A job counts its trainers' children, and kills them: those of a demo are what a user has."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv(prepared_workers.FRESH, "1")
        yield


@pytest.fixture
def settings() -> DemoSettings:
    """The settings of a model of 70 thousand parameters, trained for 24 steps."""
    return DemoSettings.model_validate(TINY)


@pytest.fixture(scope="session")
def tiny_config() -> DemoConfig:
    """A whole demo of such a model."""
    return DemoConfig.model_validate({"demo": TINY})


@pytest.fixture(scope="session")
def tiny_on_ranks() -> RanksConfig:
    """The same model, trained on two ranks, then on one."""
    return RanksConfig.model_validate({"demo": TINY_ON_RANKS})


@pytest.fixture(scope="session", autouse=True)
def fonts_are_open(tmp_path_factory: pytest.TempPathFactory) -> None:
    """matplotlib keeps the fonts that it has used open; here before the leak check looks for the first time."""
    draw_chart(Results(), tmp_path_factory.mktemp("fonts") / "empty.png")


@contextmanager
def global_state_put_back() -> Iterator[None]:
    """Training seeds the global generators and sets torch's threads."""
    rng = RngState()
    before, threads = rng.state_dict(), torch.get_num_threads()
    yield
    rng.load_state_dict(before)
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def global_state_is_put_back() -> Iterator[None]:
    with global_state_put_back():
        yield
