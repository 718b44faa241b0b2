"""``from_pretrained`` of transformers takes what is exported, bit for bit; stager takes what ``save_pretrained`` writes."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from stager import export_weights, load_checkpoint
from tests.exporting.transformers_models import NAMES, build, config_of
from tests.staging.ranks import run_ranks

transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings("default::DeprecationWarning"),  # transformers' own, of Python and torch
    pytest.mark.filterwarnings("default::FutureWarning"),
]
_WORLD_SIZES = [pytest.param(1, marks=pytest.mark.long), 2, pytest.param(4, marks=pytest.mark.long)]
_RANKS = "tests.exporting.transformers_models"
_AUTO = {"t5": "AutoModelForSeq2SeqLM"}
# save_pretrained writes the experts of Mixtral one by one, by other names than the model's.
_OF_ONE_LAYOUT = [name for name in NAMES if name != "mixtral"]


def _often(names: Iterable[str], *often: str) -> list[Any]:
    """Those that the short suite has; ``make long`` and ``make test-integrations`` have all."""
    return [name if name in often else pytest.param(name, marks=pytest.mark.long) for name in names]


_WEIGHTS = {"keys": "model", "strip_prefix": "model."}


class _Warnings(logging.Handler):
    """What transformers warns about."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture
def warned() -> Iterator[list[str]]:
    handler = _Warnings()
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    transformers.utils.logging.disable_progress_bar()
    yield handler.messages
    logger.removeHandler(handler)


def assert_is_pretrained(path: Path, name: str, expected: dict[str, torch.Tensor], **options: Any) -> None:
    """Both the class itself and the automatic one load these weights, and miss none."""
    model_class = getattr(transformers, config_of(name).architectures[0])
    for loader in (model_class, getattr(transformers, _AUTO.get(name, "AutoModelForCausalLM"))):
        model, info = loader.from_pretrained(path, output_loading_info=True, **options)
        assert type(model) is model_class
        assert not any(info.values()), info
        found = model.state_dict()
        assert found.keys() == expected.keys()
        assert [key for key, value in expected.items() if not torch.equal(found[key], value)] == []
        assert {value.dtype for value in found.values()} == {value.dtype for value in expected.values()}
        assert _tied(found) == _tied(build(name).state_dict())


def _tied(state: dict[str, torch.Tensor]) -> set[frozenset[str]]:
    groups: dict[int, set[str]] = {}
    for name, tensor in state.items():
        groups.setdefault(tensor.data_ptr(), set()).add(name)
    return {frozenset(names) for names in groups.values() if len(names) > 1}


@pytest.mark.parametrize("world_size", _WORLD_SIZES)
@pytest.mark.parametrize("name", _often(NAMES, "gpt2", "mixtral", "t5"))
def test_from_pretrained_gives_what_ranks_saved(tmp_path: Path, name: str, world_size: int, warned: list[str]) -> None:
    run_ranks(f"{_RANKS}:save", world_size, tmp_path, name)
    config_of(name).save_pretrained(tmp_path / "config")
    sidecars = [tmp_path / "config" / "config.json"]
    expected = build(name).state_dict()
    for number, most in enumerate(("5GB", "4KB")):
        out = tmp_path / str(number)
        result = export_weights(tmp_path / "run", out, **_WEIGHTS, max_shard_bytes=most, sidecars=sidecars)
        assert (len(result.files) > 1) == (most == "4KB")
        assert_is_pretrained(out, name, expected)
    half = {key: value.bfloat16() for key, value in expected.items()}
    export_weights(tmp_path / "run", tmp_path / "half", **_WEIGHTS, dtype="bfloat16", sidecars=sidecars)
    assert_is_pretrained(tmp_path / "half", name, half, dtype=torch.bfloat16)
    assert warned == []


@pytest.mark.parametrize("name", _often(_OF_ONE_LAYOUT, "t5"))
def test_names_that_are_kept_are_those_that_save_pretrained_keeps(tmp_path: Path, name: str) -> None:
    run_ranks(f"{_RANKS}:save", 1, tmp_path, name)
    export_weights(tmp_path / "run", tmp_path / "out", **_WEIGHTS)
    build(name).save_pretrained(tmp_path / "pretrained")
    ours, theirs = (load_checkpoint(tmp_path / one / "model.safetensors").state for one in ("out", "pretrained"))
    tied = set(build(name).state_dict()) - set(theirs)
    assert set(ours) - tied == set(theirs)  # the reader has the tied names, too, which the metadata has


@pytest.mark.parametrize("world_size", _WORLD_SIZES)
@pytest.mark.parametrize("name", _often(_OF_ONE_LAYOUT, "t5"))
def test_what_save_pretrained_wrote_is_loaded_on_ranks(tmp_path: Path, name: str, world_size: int) -> None:
    build(name).save_pretrained(tmp_path / "pretrained", max_shard_size="4KB")
    assert len(list((tmp_path / "pretrained").glob("*.safetensors"))) > 1
    assert run_ranks(f"{_RANKS}:load", world_size, tmp_path, name) == [[]] * world_size


@pytest.mark.parametrize("name", _often(NAMES, "t5"))
def test_an_export_is_loaded_for_more_training(tmp_path: Path, name: str) -> None:
    run_ranks(f"{_RANKS}:save", 2, tmp_path, name)
    export_weights(tmp_path / "run", tmp_path / "pretrained", **_WEIGHTS, max_shard_bytes="4KB")
    (tmp_path / "store").unlink()
    for path in tmp_path.glob("result-*"):
        path.unlink()
    assert run_ranks(f"{_RANKS}:load", 4, tmp_path, name) == [[]] * 4
