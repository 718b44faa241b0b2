"""Bytes that are right and cannot be made into objects here are no damage: it is said, and nothing older is loaded."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.serialization import config as torch_config

from stager import (
    Checkpointer,
    CorruptCheckpointError,
    StagerError,
    StateMismatchError,
    UnloadableError,
    UnsafePickleError,
    load_checkpoint,
)
from stager.workers.checkpoint.formats import torch_save
from tests.persistence.tasks import save
from tests.states import same


class Meter:
    """Keeps what ``load_state_dict()`` is given, or raises what it is told to."""

    def __init__(self, value: int = 0, error: Exception | None = None) -> None:
        self.value, self.error = value, error

    def state_dict(self) -> dict[str, int]:
        if isinstance(self.error, NotImplementedError):
            raise self.error
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, int]) -> None:
        if self.error is not None:
            raise self.error
        self.value = state["value"]


class Changed:
    """A class whose ``__setstate__`` no longer takes what older versions saved."""

    error: Exception | None = None

    def __init__(self) -> None:
        self.value = 1

    def __setstate__(self, state: dict[str, Any]) -> None:
        if Changed.error is not None:
            raise Changed.error
        vars(self).update(state)


class Ledger(dict[str, Any]):
    """A mapping of its own kind: its items are stored apart, and put back by its ``__setitem__``."""

    is_closed = False

    def __setitem__(self, key: str, value: Any) -> None:
        if Ledger.is_closed:
            raise KeyError(f"{key}: the ledger is closed")
        super().__setitem__(key, value)


@pytest.fixture
def changed() -> Iterator[Callable[[Exception], None]]:
    yield lambda error: setattr(Changed, "error", error)
    Changed.error = None


def two_steps(run_dir: Path, state: dict[str, Any]) -> None:
    for step in (1, 2):
        save(run_dir, state, step=step)


ERRORS = [
    KeyError("momentum"),
    RuntimeError("not now"),
    CorruptCheckpointError("/elsewhere", "a nested checkpoint is damaged"),  # not this one
    FileNotFoundError("vocabulary.json"),
    UserWarning("a warning that is an error"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_load_state_dict_raises(run_dir: Path, error: Exception) -> None:
    two_steps(run_dir, {"w": torch.ones(3), "first": Meter(1), "meter": Meter(2), "last": Meter(3), "n": 4})
    into = {"w": torch.zeros(3), "first": Meter(), "meter": Meter(error=error), "last": Meter(), "n": 0}
    with Checkpointer(run_dir, read_only=True) as ckpt:
        with pytest.raises(UnloadableError, match=r"^meter: Meter\.load_state_dict\(\) raised") as raised:
            ckpt.load(into=into)
        assert ckpt.skipped == []
    text = str(raised.value)
    assert raised.value.__cause__ is error and type(error).__name__ in text and "step-00000002" in text
    assert "no older checkpoint was tried" in text and "meter may be restored in part" in text
    assert (
        "Restored before it: first. Not restored after it: last, n. Tensors that are read in place are restored" in text
    )
    assert (into["first"].value, into["last"].value, into["n"]) == (1, 0, 0)  # type: ignore[attr-defined]  # set on purpose
    assert same(into["w"], torch.ones(3))


def foreign_dcp(path: Path) -> None:
    dcp.save({"meter": {"value": torch.ones(2)}, "w": torch.ones(3)}, checkpoint_id=path)


def foreign_torch(path: Path) -> None:
    torch.save({"meter": {"value": 2}, "w": torch.ones(3)}, path)


@pytest.mark.parametrize("write", [foreign_dcp, foreign_torch])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_load_state_dict_raises_on_a_checkpoint_of_another_library(tmp_path: Path, write: Any) -> None:
    write(tmp_path / "other")
    error = ZeroDivisionError("by the number of ranks")
    into = {"meter": Meter(error=error), "w": torch.zeros(3)}
    with pytest.raises(UnloadableError, match=r"^meter: Meter\.load_state_dict\(\) raised ZeroDivisionError") as raised:
        load_checkpoint(tmp_path / "other", into)
    assert raised.value.__cause__ is error


def test_a_module_that_its_own_hook_refuses(run_dir: Path) -> None:
    two_steps(run_dir, {"net": nn.Linear(2, 2)})
    net = nn.Linear(2, 2)

    def refuse(*args: Any) -> None:
        raise LookupError("no such head")

    net.register_load_state_dict_pre_hook(refuse)
    with (
        Checkpointer(run_dir, read_only=True) as ckpt,
        pytest.raises(UnloadableError, match=r"^net: Linear\.load_state_dict"),
    ):
        ckpt.load(into={"net": net})


def test_state_dict_of_the_target_raises(run_dir: Path) -> None:
    two_steps(run_dir, {"net": nn.Linear(2, 2)})
    net = nn.Linear(2, 2)

    def refuse(*args: Any) -> None:
        raise LookupError("not built yet")

    net.register_state_dict_pre_hook(refuse)
    with Checkpointer(run_dir, read_only=True) as ckpt:
        with pytest.raises(
            UnloadableError,
            match=r"^net: Linear\.state_dict\(\) of the target .* raised LookupError: not built",
        ):
            ckpt.load(into={"net": net})


@pytest.mark.parametrize("error", ERRORS[:-1], ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("kind", ["dcp", "torch", "safetensors"])
def test_setstate_raises(run_dir: Path, kind: str, error: Exception, changed: Callable[[Exception], None]) -> None:
    for step in (1, 2):
        save(run_dir, {"n": step, "part": {"thing": Changed()}}, step=step, kind=kind)
    changed(error)
    with Checkpointer(run_dir, read_only=True) as ckpt:
        for into in (None, {"n": 0, "part": {"thing": None}}):
            with pytest.raises(
                UnloadableError, match=r"^part\['thing'\]: its bytes in .*step-00000002 are intact"
            ) as raised:
                ckpt.load(into=into, allow_pickle=True)
            assert raised.value.__cause__ is error and ckpt.skipped == []
        loaded = ckpt.load(keys="n", allow_pickle=True)  # as the message says
    assert loaded is not None and loaded.state == {"n": 2}


def test_setstate_raises_in_a_file_of_torch_save(tmp_path: Path, changed: Callable[[Exception], None]) -> None:
    path = tmp_path / "other.pt"
    torch.save({"thing": Changed()}, path)
    changed(KeyError("momentum"))
    with pytest.raises(UnloadableError, match="KeyError: 'momentum'"):
        load_checkpoint(path, allow_pickle=True)
    data = bytearray(path.read_bytes())
    data[data.index(b"Changed")] ^= 1
    path.write_bytes(data)  # the same error could come from this: nobody can tell any more
    with pytest.raises(StagerError, match=r"other\.pt"):
        load_checkpoint(path, allow_pickle=True)


def test_a_container_whose_class_refuses_its_items(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger()
    ledger["weight"] = torch.ones(2)
    two_steps(run_dir, {"books": {"ledger": ledger}})
    monkeypatch.setattr(Ledger, "is_closed", True)
    with Checkpointer(run_dir, read_only=True) as ckpt:
        for into in (None, {"books": {"ledger": None}}):
            with pytest.raises(UnloadableError, match=r"^books\['ledger'\]: .*the ledger is closed") as raised:
                ckpt.load(into=into, allow_pickle=True)
            assert isinstance(raised.value.__cause__, KeyError)


@pytest.mark.parametrize("loss", ["module", "class"])
def test_the_module_or_the_class_is_gone(run_dir: Path, loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = types.ModuleType("renamed_since")
    kind = type("Schedule", (), {"__module__": "renamed_since"})
    module.Schedule = kind
    monkeypatch.setitem(sys.modules, "renamed_since", module)
    two_steps(run_dir, {"schedule": kind(), "n": 1})
    if loss == "module":
        monkeypatch.delitem(sys.modules, "renamed_since")
    else:
        del module.Schedule
    with Checkpointer(run_dir, read_only=True) as ckpt:
        with pytest.raises(UnloadableError, match=r"^schedule: .*renamed_since") as raised:
            ckpt.load(allow_pickle=True)
        assert isinstance(raised.value.__cause__, (ImportError, AttributeError))
        with pytest.raises(UnsafePickleError, match=r"its class renamed_since\.Schedule is not allowed"):
            ckpt.load()
        assert ckpt.skipped == []


def freed(tensor: torch.Tensor) -> torch.Tensor:
    tensor.untyped_storage().resize_(0)
    return tensor


def shrunk(tensor: torch.Tensor) -> torch.Tensor:
    tensor.untyped_storage().resize_(8)
    return tensor


def faked(tensor: torch.Tensor) -> torch.Tensor:
    with FakeTensorMode():
        return torch.empty_strided(tensor.shape, tensor.stride())


@pytest.mark.parametrize("spoil", [freed, shrunk, faked])
@pytest.mark.parametrize("kind", ["dcp", "torch", "safetensors"])
def test_a_target_without_its_memory_is_refused(run_dir: Path, kind: str, spoil: Callable[..., torch.Tensor]) -> None:
    """Reading into it would write into memory of something else."""
    save(run_dir, {"layer": {"w": torch.ones(1000), "n": torch.ones(20, 30)}}, step=1, kind=kind)
    for tensor in (torch.zeros(1000), torch.zeros(30, 20).t()):
        name = "w" if tensor.dim() == 1 else "n"
        module = nn.Module()
        module.register_buffer(name, spoil(tensor.clone()))
        for target in ({name: spoil(tensor.clone())}, module):
            with Checkpointer(run_dir, read_only=True) as ckpt:
                with pytest.raises(StateMismatchError, match=rf"layer\['{name}'\]: .*materialize the target"):
                    ckpt.load(into={"layer": target}, strict=False)


# -- settings of torch for the whole process ------------------------------------------------------------------------


@contextmanager
def variable(name: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name, "1")
        yield


@contextmanager
def default_device(name: str) -> Iterator[None]:
    with torch.device(name):
        yield


@contextmanager
def default_dtype() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(before)


@contextmanager
def endianness() -> Iterator[None]:
    before = torch.serialization.get_default_load_endianness()
    torch.serialization.set_default_load_endianness(torch.serialization.LoadEndianness.BIG)
    yield
    torch.serialization.set_default_load_endianness(before)


@contextmanager
def no_checksums() -> Iterator[None]:
    torch.serialization.set_crc32_options(False)
    yield
    torch.serialization.set_crc32_options(True)


def patched(**settings: Any) -> AbstractContextManager[Any]:
    return torch_config.patch({name.replace("__", "."): value for name, value in settings.items()})  # type: ignore[no-any-return]  # torch gives it no types


SETTINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "force weights_only": lambda: variable("TORCH_FORCE_WEIGHTS_ONLY_LOAD"),
    "force no weights_only": lambda: variable("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"),
    "mmap": lambda: patched(load__mmap=True),
    "calculated offsets": lambda: patched(load__calculate_storage_offsets=True),
    "endianness": endianness,
    "alignment": lambda: patched(save__storage_alignment=4096),
    "no checksums": no_checksums,
    "pinned memory": lambda: patched(save__use_pinned_memory_for_d2h=True),
    "skip_data": torch.serialization.skip_data,
    "meta": lambda: default_device("meta"),
    "bfloat16": default_dtype,
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
}


def varied() -> dict[str, Any]:
    return {
        "w": torch.arange(5.0, dtype=torch.float32),
        "sparse": torch.eye(3, dtype=torch.float64).to_sparse(),
        "pair": (1, torch.arange(4, dtype=torch.int32)),
        "ledger": Ledger(weight=torch.full((3,), 2.0, dtype=torch.float32)),
        "n": 7,
    }


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", ["dcp", "torch", "safetensors"])
def test_a_setting_of_torch_changes_neither_what_is_saved_nor_what_is_loaded(
    run_dir: Path, kind: str, setting: str
) -> None:
    run_dir.mkdir()
    state = varied()
    save(run_dir / "without", state, step=1, kind=kind)
    torch_save.header_and_tail.cache_clear()
    with SETTINGS[setting]():
        save(run_dir / "with", state, step=1, kind=kind)
        found = []
        for directory in ("without", "with"):
            with Checkpointer(run_dir / directory, read_only=True) as ckpt:
                found.append(ckpt.load(allow_pickle=True))
            assert ckpt.skipped == []
    for loaded in found:
        assert loaded is not None
        assert_same(loaded.state, state)
    torch_save.header_and_tail.cache_clear()
    with Checkpointer(run_dir / "with", read_only=True) as ckpt:
        loaded = ckpt.load(allow_pickle=True)
    assert loaded is not None
    assert_same(loaded.state, state)


def test_a_save_and_a_load_while_torch_makes_fake_tensors(run_dir: Path) -> None:
    """A user who traces a model has this on, in the thread that saves and loads."""
    state = varied()
    with Checkpointer(run_dir) as ckpt:
        with FakeTensorMode():
            ckpt.save(1, state).upload_completion.result()
            loaded = ckpt.load(allow_pickle=True)
    assert loaded is not None
    assert_same(loaded.state, state)


def assert_same(loaded: Any, state: Any) -> None:
    assert loaded.keys() == state.keys() and type(loaded["ledger"]) is Ledger
    assert same(loaded["w"], state["w"]) and same(loaded["ledger"]["weight"], state["ledger"]["weight"])
    assert torch.equal(loaded["sparse"].to_dense(), state["sparse"].to_dense())
    assert loaded["pair"][0] == 1 and torch.equal(loaded["pair"][1], state["pair"][1]) and loaded["n"] == 7
