"""The demo's settings: the file equals the defaults, and what cannot work is refused before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stager import ConfigError, StagerConfig, UsageError, load_config
from stager.demo import DemoConfig, DemoSettings, RanksConfig
from stager.demo.run import find_ranks, world_size
from stager.demo.train import TrainingRun
from tests.demo.conftest import TINY, TINY_ON_RANKS

CONFIGS = Path(__file__).parents[2] / "configs"
ON_TWO_RANKS = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}


@pytest.mark.parametrize(("file", "model"), [("demo.yaml", DemoConfig), ("torchrun.yaml", RanksConfig)])
def test_file_spells_out_every_default_and_nothing_else(file: str, model: type[DemoConfig]) -> None:
    assert load_config(CONFIGS / file, model=model, environ={}) == model()
    text = (CONFIGS / file).read_text(encoding="utf-8")
    assert [name for name in DemoSettings.model_fields if f"\n  {name}: " not in text] == []


def test_file_for_ranks_says_the_same_to_either_model() -> None:
    """So that ``demo-config.json`` of a demo on ranks can be read by each rank as a DemoConfig."""
    loaded = load_config(CONFIGS / "torchrun.yaml", model=DemoConfig, environ={})
    assert loaded.demo.model_dump() == RanksConfig().demo.model_dump()
    assert DemoConfig.model_validate_json(RanksConfig().model_dump_json()).demo.model_dump() == loaded.demo.model_dump()


def test_one_setting_leaves_the_other_defaults_on_ranks_as_they_are() -> None:
    config = load_config(None, ["demo.seed=7"], model=RanksConfig, environ={})
    assert config.demo == RanksConfig().demo.model_copy(update={"seed": 7})


def test_checkpointer_may_be_given_the_same_file() -> None:
    assert load_config(CONFIGS / "torchrun.yaml", environ={}) == StagerConfig()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 25}, "multiple of save_every"),
        ({"kill_staging_at_save": 5}, "must differ"),
        ({"kill_writing_at_save": 8}, "below the number of saves"),
        ({"kill_staging_at_save": 8}, "below the number of saves"),
        ({"kill_staging_at_save": 1}, "kill_staging_at_save"),
        ({"other_ranks": [2]}, "below steps"),
        ({"measure_saves": -1}, "measure_saves"),
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 25}, "multiple of save_every"),
        ({"kill_writing_at_save": 4}, "must differ"),
        ({"kill_staging_at_save": 12}, "below the number of saves"),
        ({"dropout_steps": 15}, "multiple of save_every"),
        ({"dropout_steps": 24}, "below steps"),
        ({"dropout_steps": 0}, "dropout_steps"),
        ({"other_ranks": [1, 3]}, r"multiple of the number of ranks \(3\)"),
        ({"other_ranks": [0]}, r"multiple of the number of ranks \(0\)"),
        ({"n_head": 3}, "multiple of n_head"),
        ({"tolerance": 0.0}, "tolerance"),
    ],
)
def test_settings_that_cannot_work_on_ranks_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config({"demo": TINY_ON_RANKS | change}, model=RanksConfig, environ={})


def test_kills_come_in_the_order_of_their_saves() -> None:
    assert [save for _, save in DemoSettings().kills] == [4, 7]
    assert [save for _, save in RanksConfig().demo.kills] == [2, 4]


def test_auto_threads_leave_a_core_to_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, ranks, threads in ((1, 1, 1), (2, 1, 1), (3, 1, 2), (64, 1, 4), (4, 2, 1), (9, 2, 4)):
        monkeypatch.setattr("stager.demo.config.usable_cores", lambda cores=cores: cores)
        assert DemoSettings().threads_for(ranks) == threads
        fixed = DemoConfig().with_fixed_threads(ranks)
        assert fixed.demo.num_threads == threads


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


def test_ranks_are_those_of_torchrun(tiny_on_ranks: RanksConfig, tiny_config: DemoConfig) -> None:
    assert find_ranks(ON_TWO_RANKS, tiny_on_ranks) == (1, 2)
    assert find_ranks(ON_TWO_RANKS, tiny_config) == (1, 2)
    assert find_ranks({}, tiny_config) == find_ranks({"RANK": "0", "WORLD_SIZE": "1"}, tiny_config) == (0, 1)
    assert (world_size({}), world_size({"WORLD_SIZE": ""}), world_size(ON_TWO_RANKS)) == (1, 1, 2)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "start them with torchrun:\n  torchrun --nproc-per-node 2 -m stager demo"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "start them with torchrun"),
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}, "on one host"),
        ({"RANK": "0", "WORLD_SIZE": "4"}, r"batch_size \(2\) must be a multiple of the number of ranks \(4\)"),
    ],
)
def test_ranks_that_do_not_fit_are_wrong_usage(
    environment: dict[str, str], message: str, tiny_on_ranks: RanksConfig
) -> None:
    with pytest.raises(UsageError, match=message):
        find_ranks(environment, tiny_on_ranks)
