"""What is drawn: the same for the same seed, everything in the end, and nothing that is held."""

from __future__ import annotations

from stager.config import load_config
from stager.stress.config import KINDS, StressConfig
from stager.stress.drawing import draw_episode
from stager.stress.episode import Episode
from stager.stress.fault_kinds import STORAGE_POINTS, TRAINER_POINTS, WORKER_POINTS, Damage, PointFault
from stager.stress.training import digests_of
from stager.workers import faults

CONFIG = StressConfig()
NUMBERS = range(400)


def test_same_seed_and_number_draw_the_same_episode() -> None:
    for number in range(50):
        drawn = draw_episode(3, number, CONFIG)
        assert drawn == draw_episode(3, number, CONFIG) == Episode.from_json(drawn.to_json())
    assert draw_episode(3, 0, CONFIG) != draw_episode(4, 0, CONFIG) != draw_episode(4, 1, CONFIG)


def test_same_episode_has_the_same_states() -> None:
    spec = draw_episode(3, 1, CONFIG).training
    first = list(digests_of(spec, 6))
    assert first == list(digests_of(spec, 6))
    assert len(set(first)) == 6


def test_every_kind_point_and_setting_comes_up() -> None:
    episodes = [draw_episode(1, number, CONFIG) for number in NUMBERS]
    drawn = [fault for episode in episodes for fault in episode.faults]
    points = {fault.point for fault in drawn if isinstance(fault, PointFault)}
    assert points == {*TRAINER_POINTS, *WORKER_POINTS}
    assert {"full-disk", "pressure", "removed", "damage", "signal", "point"} == {fault.kind for fault in drawn}
    assert {len(episode.faults) for episode in episodes} == {0, 1, 2, 3}
    assert {run.ending for episode in episodes for run in episode.runs} == {
        *("close", "forget", "exception", "exit", "os-exit")
    }
    assert {episode.config["workers"]["count"] for episode in episodes} == {1, 2, 3}
    kinds = {leaf.kind for episode in episodes for leaf in episode.training.leaves}
    assert {"tensor", "tied", "slice", "transposed", "strided", "scalar", "empty", "object", "custom"} <= kinds


def test_every_point_is_one_that_exists() -> None:
    assert faults.__doc__ is not None
    words = faults.__doc__.replace("`", " ").replace(";", " ").replace(".\n", " ").split()
    assert {*TRAINER_POINTS, *STORAGE_POINTS, *WORKER_POINTS} <= set(words)


def test_plans_can_be_played() -> None:
    for number in NUMBERS:
        episode = draw_episode(2, number, CONFIG)
        untils = [run.until for run in episode.runs]
        assert untils == sorted(untils) and untils[0] > 0 and episode.saves_at(episode.num_steps - 1)
        assert episode.training.max_nbytes <= CONFIG.stress.max_state_bytes * 2
        load_config(episode.config, environ={})
        assert not any(isinstance(fault, Damage) for fault in episode.runs[0].faults) or len(episode.runs) == 1


def test_what_cannot_be_done_here_is_not_done_and_changes_nothing_else() -> None:
    numbers = [n for n in NUMBERS if draw_episode(1, n, CONFIG).small_disk]
    assert numbers
    for number in numbers[:5]:
        whole = draw_episode(1, number, CONFIG)
        less = draw_episode(1, number, CONFIG, frozenset({"full-disk"}))
        assert not less.small_disk and less.training == whole.training
        assert less.faults == tuple(fault for fault in whole.faults if fault.kind != "full-disk")


def test_settings_that_are_given_are_held() -> None:
    overrides = ["workers.count=2", "persistence.fsync=false", "stress.faults=[damage]", "stress.max_faults=1"]
    config = load_config(None, overrides, environ={}, model=StressConfig)
    for number in range(30):
        episode = draw_episode(1, number, config)
        assert episode.config["workers"]["count"] == 2 and episode.config["persistence"]["fsync"] is False
        assert {fault.kind for fault in episode.faults} <= {"damage"}
    assert set(KINDS) == set(CONFIG.stress.faults)
