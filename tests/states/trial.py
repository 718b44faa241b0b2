"""One trial: save a state of the corpus in one format, load it in one way, and say what differs from the oracle.

    problems = Bench("dcp", directory).trial(CORPUS["wrapper"], "fresh")

``stager.load_checkpoint`` and readers without stager see the same files as ``Checkpointer.load``.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from stager import (
    Checkpointer,
    CheckpointInfo,
    CorruptCheckpointError,
    StagerError,
    UnsafePickleError,
    UnstageableError,
)
from tests.states import DTYPES
from tests.states.corpus import Expect, State
from tests.states.equal import IN_PLACE, VALUES_ONLY, differences
from tests.states.oracle import Oracle, ask

FORMATS = ("dcp", "torch", "safetensors")
WAYS = ("fresh", "pickled", "into", "stock")
"""fresh: load(); pickled: load(allow_pickle=True); into: load(into=target, allow_pickle=True); stock: without stager."""

_OLDER_STEP, _STEP = 0, 1  # an older checkpoint, which no load may fall back to; each state's replaces the last one's


@dataclass(frozen=True)
class _Saved:
    """
    Attributes:
        path: of its directory; None if the save failed.
        oracle: what torch gives.
        problems: of the save itself.
    """

    path: str | None
    oracle: Oracle
    problems: list[str]


class Bench:
    """A Checkpointer of one format, and what it has saved. It saves each state once."""

    def __init__(self, file_format: str, directory: str) -> None:
        settings = {
            "persistence": {"format": file_format, "fsync": False},
            "workers": {"count": 1},
            "arena": {"prefault": False},
            "loading": {"threads": 1},
        }
        self.file_format = file_format
        self._checkpointer = Checkpointer(directory, settings)
        self._checkpointer.save(_OLDER_STEP, {"x": 0}).upload_completion.result()
        self._saved: dict[str, _Saved] = {}

    def trial(self, state: State, way: str) -> list[str]:
        """Return what is wrong, one line each."""
        with quiet():
            if state.name not in self._saved:
                self._saved.clear()  # states come one after the other: the last one's oracle is enough
                self._saved[state.name] = self._save(state)
            saved = self._saved[state.name]
            if saved.path is None or state.expect is Expect.REFUSED:
                return saved.problems if way == WAYS[0] else []
            try:
                return self._load(state, saved, way)
            except (Exception, CheckpointException) as error:  # noqa: BLE001  # any error is what the trial is about
                return [f"{way}: {_line(error)}"]

    def close(self) -> None:
        self._checkpointer.close()

    # -- saving -----------------------------------------------------------------------------------------------------

    def _save(self, state: State) -> _Saved:
        oracle = ask(state)
        refused = state.expect is Expect.REFUSED or oracle.error is not None
        before = self._checkpointer.checkpoints()
        made = state.build()
        try:
            with state.around():
                info = self._checkpointer.save(_STEP, made).upload_completion.result()
        except Exception as error:  # noqa: BLE001  # any error is what the trial is about
            problems = self._refusal(error, before)
            return _Saved(None, oracle, problems if refused else [f"save: {_line(error)}"])
        problems = ["save: committed a checkpoint of what cannot be saved"] if state.expect is Expect.REFUSED else []
        return _Saved(info.path, oracle, problems)

    def _refusal(self, error: Exception, before: list[CheckpointInfo]) -> list[str]:
        problems = []
        if not isinstance(error, UnstageableError):
            problems.append(f"save: raw error {_line(error)}")
        elif not error.key_path:
            problems.append(f"save: refused without a key path: {_line(error)}")
        if self._checkpointer.checkpoints() != before:
            problems.append("save: raised, and committed a checkpoint")
        return problems

    # -- loading ----------------------------------------------------------------------------------------------------

    def _load(self, state: State, saved: _Saved, way: str) -> list[str]:
        if way == "stock":
            return _STOCK[self.file_format](state, saved) if state.expect is Expect.EQUAL else []
        if state.expect is Expect.UNLOADABLE:
            return self._unloadable(state, saved, way)
        if way == "into":
            return self._into(state, saved)
        return self._fresh(state, saved, allow_pickle=way == "pickled")

    def _fresh(self, state: State, saved: _Saved, *, allow_pickle: bool) -> list[str]:
        way = "pickled" if allow_pickle else "fresh"
        try:
            with state.around():
                loaded = self._checkpointer.load(allow_pickle=allow_pickle)
        except UnsafePickleError as error:
            must = saved.oracle.is_safe or state.by_default or allow_pickle
            return [f"{way}: {_line(error)}"] if must else []
        if loaded is None or loaded.step != _STEP:
            return [f"{way}: load() silently took {'nothing' if loaded is None else 'an older checkpoint'}"]
        return [f"{way}: {line}" for line in differences(loaded.state, saved.oracle.value)]

    def _into(self, state: State, saved: _Saved) -> list[str]:
        target = state.build()
        tensors = _wipe(target)
        with state.around():
            loaded = self._checkpointer.load(into=target, allow_pickle=True)
        if loaded is None or loaded.step != _STEP:
            return [f"into: load() silently took {'nothing' if loaded is None else 'an older checkpoint'}"]
        if state.plain is not None:
            target = {name: _state_of(value) for name, value in target.items()}
        problems = differences(target, saved.oracle.value, IN_PLACE)
        if state.plain is None:
            kept = {id(tensor) for tensor in _tensors(target)}
            if replaced := sum(id(tensor) not in kept for tensor in tensors):
                problems.append(f"identity: {replaced} tensors of the target were replaced")
        return [f"into: {line}" for line in problems]

    def _unloadable(self, state: State, saved: _Saved, way: str) -> list[str]:
        if way == "fresh":
            return []
        try:
            loaded = self._checkpointer.load(into=state.build() if way == "into" else None, allow_pickle=True)
        except CorruptCheckpointError as error:
            return [f"{way}: taken for damage: {_line(error)}"]
        except StagerError as error:
            return (
                []
                if error.__cause__ is not None and "x" in str(error)
                else [f"{way}: no cause or no key: {_line(error)}"]
            )
        step = None if loaded is None else loaded.step
        return [f"{way}: load() answers step {step}, and the newest checkpoint cannot be unpickled"]


def _wipe(target: Any) -> list[torch.Tensor]:
    """Zero what tensors of a target can be zeroed. Returns them: they have to keep their identity."""
    wiped = []
    with torch.no_grad():
        for tensor in _tensors(target):
            if type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout is torch.strided:
                try:
                    tensor.zero_()
                except (RuntimeError, NotImplementedError):  # expanded, quantized, inference tensors
                    continue
                wiped.append(tensor)
    return wiped


def _tensors(value: Any, depth: int = 0) -> Iterator[torch.Tensor]:
    """The tensors in mappings and lists, in which load(into=) works in place."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (Mapping, list)) and depth < 150:
        for child in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(child, depth + 1)


def _state_of(value: Any) -> Any:
    if isinstance(value, list):
        return [_state_of(one) for one in value]
    return value.state_dict() if hasattr(value, "state_dict") else value


# -- readers without stager -------------------------------------------------------------------------------------------


def _stock_torch(state: State, saved: _Saved) -> list[str]:
    path = os.path.join(saved.path or "", "state.pt")
    value = torch.load(path, weights_only=saved.oracle.is_safe)
    return [f"stock: {line}" for line in differences(value, saved.oracle.value)]


def _stock_dcp(state: State, saved: _Saved) -> list[str]:
    """What dcp.load gives of our files is what it gives of those that dcp.save writes of the same state."""
    theirs = os.path.join(os.path.dirname(saved.path or ""), "..", "stock")
    try:
        shutil.rmtree(theirs, ignore_errors=True)
        dcp.save(dict((state.plain or state.build)()), checkpoint_id=theirs, no_dist=True)
        want = _dcp_load(theirs)
    except (Exception, CheckpointException):  # noqa: BLE001  # DCP does not take it, so its reader cannot be asked to
        want = None
    if want is None:
        return []
    return [f"stock: {line}" for line in differences(_dcp_load(saved.path or ""), want, VALUES_ONLY)]


def _dcp_load(path: str) -> dict[str, Any]:
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    loaded: dict[str, Any] = {}
    _load_state_dict(loaded, dcp.FileSystemReader(path), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    return {  # stock keeps objects as the bytes of torch.save in some versions
        name: torch.load(value, weights_only=False) if isinstance(value, io.BytesIO) else value
        for name, value in loaded.items()
    }


_SAFETENSORS_DTYPES = frozenset({*DTYPES} - {torch.complex128})


def _stock_safetensors(state: State, saved: _Saved) -> list[str]:
    """Each plain tensor of the oracle's mappings is there under its dotted name, tied ones under one of their names."""
    from safetensors.torch import load_file

    want = {name: tensor for name, tensor in _dotted(saved.oracle.value, ()) if tensor.dtype in _SAFETENSORS_DTYPES}
    path = os.path.join(saved.path or "", "state.safetensors")
    got = load_file(path) if want or os.path.exists(path) else {}
    there = {want[name].untyped_storage()._cdata for name in want if name in got}
    want = {n: tensor for n, tensor in want.items() if n in got or tensor.untyped_storage()._cdata not in there}
    return [f"stock: {line}" for line in differences({n: got[n] for n in want if n in got}, want, VALUES_ONLY)]


def _dotted(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        if (
            type(value) in (torch.Tensor, torch.nn.Parameter)
            and value.layout is torch.strided
            and not (value.is_quantized or value.is_nested)
        ):
            yield ".".join(path), value
    elif isinstance(value, dict) and len(path) < 90:
        for key, child in value.items():
            yield from _dotted(child, (*path, str(key)))


_STOCK = {"torch": _stock_torch, "dcp": _stock_dcp, "safetensors": _stock_safetensors}


# -- helpers ----------------------------------------------------------------------------------------------------------


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of torch and stager about what the corpus holds on purpose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _line(error: BaseException) -> str:
    """An error in one line."""
    text = re.sub(r"\S*/step-0*1\b", "DIR", " ".join(str(error).split()))
    return f"{type(error).__name__}: {text}"[:260]
