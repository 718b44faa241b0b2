"""Objects that are loaded from formats of others, alone or in a state."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from stager import UnloadableError, UnsafePickleError, UsageError, load_checkpoint
from tests.loading.foreign_files import Counts, save_dcp, small_model
from tests.loading.restoring import contents
from tests.states import same

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def test_an_object_gets_its_keys_as_it_has_them(tmp_path: Path) -> None:
    path = save_dcp(tmp_path / "stock", {"loader": Counts({3: 1, 4: 2})})
    loader = Counts({3: 0})
    load_checkpoint(path, {"loader": loader})
    assert loader.counts == {3: 1, 4: 2}


@dataclasses.dataclass(frozen=True)
class Unknown:
    n: int


def test_an_object_that_needs_permission_is_read_only_if_it_is_asked_for(tmp_path: Path) -> None:
    path = save_dcp(tmp_path / "stock", {"w": torch.ones(2), "o": {Unknown(3)}, "n": 3})
    w = torch.zeros(2)
    load_checkpoint(path, {"w": w, "n": 0})
    assert w.all()
    w.zero_()
    with pytest.raises(UnsafePickleError, match=r"o in .* allow_pickle"):
        load_checkpoint(path, {"w": w, "o": None})
    assert not w.any()
    assert load_checkpoint(path, {"w": w, "o": None}, allow_pickle=True).state["o"] == {Unknown(3)}


class Gone:
    """Its class is not there any more when it is loaded."""


@pytest.mark.parametrize("kind", ["dcp", "torch.save", "no archive"])
def test_an_object_that_cannot_be_made_is_told_and_nothing_is_changed(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, state = tmp_path / "saved", {"w": torch.ones(2), "deep": {"o": Gone()}}
    if kind == "dcp":
        save_dcp(path, state)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "torch.save")
    monkeypatch.delattr(f"{__name__}.Gone")
    w = torch.zeros(2)
    with pytest.raises(UnloadableError, match="Gone") as raised:
        load_checkpoint(path, {"w": w, "deep": {"o": None}}, allow_pickle=True)
    assert not w.any()
    if kind == "dcp":  # the others are one pickle
        assert raised.value.key_path == "deep.o"
        load_checkpoint(path, {"w": w, "deep": {"o": None}}, keys="w")
        assert w.all()


class Refuses(Counts):
    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise ValueError("not this one")


@pytest.mark.parametrize("kind", ["dcp", "torch.save"])
def test_a_load_state_dict_that_raises_is_told_with_its_key_path(tmp_path: Path, kind: str) -> None:
    path, state = tmp_path / "saved", {"w": torch.ones(2), "deep": {"loader": {"counts": {3: 1}}}}
    torch.save(state, path) if kind == "torch.save" else save_dcp(path, state)
    with pytest.raises(
        UnloadableError, match=r"Refuses\.load_state_dict\(\) raised ValueError: not this one"
    ) as raised:
        load_checkpoint(path, {"w": torch.zeros(2), "deep": {"loader": Refuses({3: 0})}})
    assert raised.value.key_path == "deep['loader']" and isinstance(raised.value.__cause__, ValueError)


@pytest.mark.parametrize("kind", ["dcp", "torch.save", "no archive", "safetensors", "stager"])
@pytest.mark.parametrize("is_itself", [False, True])
def test_one_object_is_filled_from_its_own_state_dict_or_its_entry(tmp_path: Path, kind: str, is_itself: bool) -> None:
    from tests.persistence.tasks import save

    model = small_model()
    state: dict[str, Any] = dict(model.state_dict()) if is_itself else {"model": model.state_dict(), "n": torch.ones(1)}
    path = tmp_path / "saved"
    if kind == "dcp":
        save_dcp(path, state)
    elif kind == "safetensors":
        names = state if is_itself else {f"model.{name}": one for name, one in model.state_dict().items()}
        safetensors.torch.save_file(names, path)
    elif kind == "stager":
        path = Path(save(tmp_path / "run", state).path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "torch.save")
    other = small_model()
    assert load_checkpoint(path, other).state is other
    assert same(dict(other.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("kind", ["dcp", "torch.save", "safetensors"])
def test_the_state_dict_of_one_object_is_not_taken_for_a_mapping_of_names(tmp_path: Path, kind: str) -> None:
    model, path = small_model(), tmp_path / "saved"
    if kind == "dcp":
        save_dcp(path, dict(model.state_dict()))
    elif kind == "safetensors":
        safetensors.torch.save_file(dict(model.state_dict()), path)
    else:
        torch.save(model.state_dict(), path)
    target = {"model": small_model()}
    before = contents(target)
    with pytest.raises(UsageError, match=r"no 'model'.* 0\.weight, 0\.bias, .* load_checkpoint\(path, into=model\)"):
        load_checkpoint(path, target)
    assert contents(target) == before
