"""Classes of the user's own: warned of once, by name, and loaded once they are named in the settings."""

from __future__ import annotations

import enum
import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from stager import Checkpointer, ConfigError, UnsafePickleError, load_checkpoint


class Phase(enum.Enum):
    WARMUP = 1
    DECAY = "decay"


class Level(enum.IntFlag):
    LOW = 1
    HIGH = 2


@dataclass
class Plan:
    phase: Phase
    steps: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Frozen:
    name: str
    level: Level = Level.LOW | Level.HIGH


STATE: dict[str, Any] = {
    "plan": Plan(Phase.DECAY, [1, 2]),
    "nested": (1, [Frozen("a")], {"phase": Phase.WARMUP}),
    "plans": [Plan(Phase.WARMUP)],
    "w": torch.ones(2),
}
NAMES = [f"{__name__}.{kind.__name__}" for kind in (Phase, Level, Plan, Frozen)]


def named_in(text: str) -> set[str]:
    return set(re.findall(rf"{re.escape(__name__)}\.\w+", text))


@pytest.mark.parametrize("kind", ["dcp", "torch", "safetensors"])
def test_the_advice_of_the_message_is_followed_until_it_loads(
    run_dir: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "stager"), Checkpointer(run_dir, {"persistence": {"format": kind}}) as ckpt:
        for step in (1, 2, 3):
            ckpt.save(step, STATE).upload_completion.result()
    warned = [record.getMessage() for record in caplog.records if "is pickled" in record.getMessage()]
    assert set().union(*map(named_in, warned)) == set(NAMES)
    advised = [text.partition("safe_globals: ")[2] for text in warned]
    assert sum(len(named_in(text)) for text in advised) == len(NAMES)  # each once
    assert not any("\x1b" in text for text in warned)
    names: list[str] = []
    for _ in NAMES:
        with Checkpointer(run_dir, {"loading": {"safe_globals": names}}, read_only=True) as ckpt:
            try:
                loaded = ckpt.load()
                break
            except UnsafePickleError as error:
                assert "\x1b" not in str(error) and "loading.safe_globals" in str(error)
                found = named_in(str(error)) - set(names)
                assert found
                names += sorted(found)
    with Checkpointer(run_dir, {"loading": {"safe_globals": names}}, read_only=True) as ckpt:
        loaded = ckpt.load()
    assert loaded is not None and loaded.step == 3
    assert {key: loaded.state[key] for key in ("plan", "nested", "plans")} == {
        key: STATE[key] for key in ("plan", "nested", "plans")
    }


def test_classes_that_are_named_need_no_warning(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "stager"):
        with Checkpointer(run_dir, {"loading": {"safe_globals": NAMES}}) as ckpt:
            ckpt.save(1, STATE).upload_completion.result()
            assert ckpt.load() is not None
    assert not [record for record in caplog.records if "is pickled" in record.getMessage()]


def test_a_name_that_cannot_be_imported_is_said(run_dir: Path) -> None:
    with Checkpointer(run_dir) as ckpt:
        ckpt.save(1, STATE).upload_completion.result()
    config = {"loading": {"safe_globals": [f"{__name__}.Renamed"]}}
    with (
        Checkpointer(run_dir, config, read_only=True) as ckpt,
        pytest.raises(ConfigError, match=r"safe_globals.*Renamed"),
    ):
        ckpt.load()


def test_a_file_of_torch_save_is_refused_with_the_class_and_without_torchs_text(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "other.pt")
    with pytest.raises(UnsafePickleError) as raised:
        load_checkpoint(tmp_path / "other.pt")
    text = str(raised.value)
    assert named_in(text) == set(NAMES) and "\x1b" not in text and "\n" not in text
    with torch.serialization.safe_globals([Phase, Level, Plan, Frozen]):
        assert load_checkpoint(tmp_path / "other.pt").state["plan"] == STATE["plan"]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("origin", ["stager", "torch.save", "dcp.save"])
def test_load_checkpoint_allows_the_classes_that_are_named(run_dir: Path, tmp_path: Path, origin: str) -> None:
    path = tmp_path / "other"
    if origin == "stager":
        with Checkpointer(run_dir) as ckpt:
            path = Path(ckpt.save(1, STATE).upload_completion.result().path)
    elif origin == "torch.save":
        torch.save(STATE, path)
    else:
        dcp.save(STATE, checkpoint_id=str(path), no_dist=True)
    with pytest.raises(UnsafePickleError, match=r"load_checkpoint\(.*, safe_globals="):
        load_checkpoint(path, safe_globals=NAMES[:1])
    assert load_checkpoint(path, safe_globals=NAMES).state["plan"] == STATE["plan"]
    with pytest.raises(ConfigError, match=r"safe_globals.*Renamed"):
        load_checkpoint(path, safe_globals=[f"{__name__}.Renamed"])
