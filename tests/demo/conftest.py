"""A demo small enough for the suite, and torch's global settings put back after each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from stager.demo import DemoConfig, DemoSettings
from stager.demo.chart import draw_chart
from stager.demo.results import Results
from stager.demo.rng import RngState

TINY = {
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


@pytest.fixture
def settings() -> DemoSettings:
    """The settings of a model of 70 thousand parameters, trained for 24 steps."""
    return DemoSettings.model_validate(TINY)


@pytest.fixture(scope="session")
def tiny_config() -> DemoConfig:
    """A whole demo of such a model."""
    return DemoConfig.model_validate({"demo": TINY})


@pytest.fixture(scope="session", autouse=True)
def fonts_are_open(tmp_path_factory: pytest.TempPathFactory) -> None:
    """matplotlib keeps the fonts that it has used open; here before the leak check looks for the first time."""
    draw_chart(Results(), tmp_path_factory.mktemp("fonts") / "empty.png")


@pytest.fixture(autouse=True)
def global_state_is_put_back() -> Iterator[None]:
    """Training seeds the global generators and sets torch's threads."""
    rng = RngState()
    before, threads = rng.state_dict(), torch.get_num_threads()
    yield
    rng.load_state_dict(before)
    torch.set_num_threads(threads)
