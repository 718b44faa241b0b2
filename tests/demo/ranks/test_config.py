"""The settings of the demo on ranks: the file equals the defaults, and what cannot work is refused before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stager import ConfigError, StagerConfig, UsageError, load_config
from stager.cli.demo import is_for_ranks
from stager.demo.ranks import RanksConfig, RanksSettings
from stager.demo.ranks.run import find_ranks
from tests.demo.ranks.conftest import TINY

CONFIGS = Path(__file__).parents[3] / "configs"
TORCHRUN_YAML = CONFIGS / "torchrun.yaml"


def test_torchrun_yaml_spells_out_every_default_and_nothing_else() -> None:
    assert load_config(TORCHRUN_YAML, model=RanksConfig, environ={}) == RanksConfig()
    text = TORCHRUN_YAML.read_text(encoding="utf-8")
    assert [name for name in RanksSettings.model_fields if f"\n  {name}: " not in text] == []


def test_checkpointer_may_be_given_the_same_file() -> None:
    assert load_config(TORCHRUN_YAML, environ={}) == StagerConfig()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 25}, "multiple of save_every"),
        ({"kill_job_at_save": 4}, "below kill_rank_at_save"),
        ({"kill_rank_at_save": 12}, "below the number of saves"),
        ({"dropout_steps": 15}, "multiple of save_every"),
        ({"dropout_steps": 24}, "below steps"),
        ({"other_ranks": [1, 3]}, r"multiple of the number of ranks \(3\)"),
        ({"other_ranks": [0]}, r"multiple of the number of ranks \(0\)"),
        ({"n_head": 3}, "multiple of n_head"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"num_threads": "auto"}, "num_threads"),
    ],
)
def test_settings_that_cannot_work_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config({"demo_ranks": TINY | change}, model=RanksConfig, environ={})


def test_ranks_are_those_of_torchrun(tiny_ranks: RanksConfig) -> None:
    environment = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    assert find_ranks(environment, tiny_ranks) == (1, 2)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "start it with torchrun:\n  torchrun --nproc-per-node 2 -m stager demo"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "torchrun started 1"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}, "on one host"),
        ({"RANK": "0", "WORLD_SIZE": "4"}, r"batch_size \(2\) must be a multiple of the number of ranks \(4\)"),
    ],
)
def test_ranks_that_do_not_do_are_wrong_usage(
    environment: dict[str, str], message: str, tiny_ranks: RanksConfig
) -> None:
    with pytest.raises(UsageError, match=message):
        find_ranks(environment, tiny_ranks)


@pytest.mark.parametrize(
    ("file", "world_size", "expected"),
    [
        (None, None, False),
        (None, "1", False),
        (None, "2", True),
        ("torchrun.yaml", None, True),
        ("torchrun.yaml", "2", True),
        ("demo.yaml", "1", False),
        ("default.yaml", "2", True),
    ],
)
def test_file_and_torchrun_say_which_demo_is_meant(file: str | None, world_size: str | None, expected: bool) -> None:
    environment = {"WORLD_SIZE": world_size} if world_size else {}
    assert is_for_ranks(CONFIGS / file if file else None, environment) is expected


def test_file_for_one_process_is_refused_under_torchrun() -> None:
    with pytest.raises(ConfigError, match="torchrun started 2"):
        is_for_ranks(CONFIGS / "demo.yaml", {"WORLD_SIZE": "2"})
