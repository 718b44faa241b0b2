"""The demo's settings: the file equals the defaults, and what cannot work is refused before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stager import ConfigError, load_config
from stager.demo import DemoConfig, DemoSettings
from stager.demo.train import TrainingRun
from tests.demo.conftest import TINY

DEMO_YAML = Path(__file__).parents[2] / "configs" / "demo.yaml"


def test_demo_yaml_spells_out_every_default_and_nothing_else() -> None:
    loaded = load_config(DEMO_YAML, model=DemoConfig, environ={})
    assert loaded == DemoConfig()
    text = DEMO_YAML.read_text(encoding="utf-8")
    assert [name for name in DemoSettings.model_fields if f"\n  {name}: " not in text] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 25}, "multiple of save_every"),
        ({"kill_staging_at_save": 5}, "below kill_writing_at_save"),
        ({"kill_writing_at_save": 8}, "below the number of saves"),
        ({"n_head": 3}, "multiple of n_head"),
        ({"warmup_steps": 24}, "below steps"),
        ({"num_threads": 0}, "num_threads"),
        ({"dropout": 1.0}, "dropout"),
        ({"n_embed": 8}, "n_embd"),
    ],
)
def test_settings_that_cannot_work_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config({"demo": TINY | change}, model=DemoConfig, environ={})


def test_auto_threads_leave_a_core_to_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, threads in ((1, 1), (2, 1), (3, 2), (64, 4)):
        monkeypatch.setattr("stager.demo.config.usable_cores", lambda cores=cores: cores)
        assert DemoSettings().threads == threads


def test_expected_checkpoint_size_is_that_of_the_state(settings: DemoSettings) -> None:
    run = TrainingRun(settings)
    run.train_step()
    tensors: list[torch.Tensor] = [*run.model.parameters()]
    tensors += [
        value
        for slots in run.optimizer.state.values()
        for value in slots.values()
        if isinstance(value, torch.Tensor) and value.dim() > 0
    ]
    assert settings.checkpoint_nbytes == sum(tensor.nbytes for tensor in tensors)
