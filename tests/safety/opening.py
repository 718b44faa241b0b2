"""Everything that opens a checkpoint or a run's directory, each as one call that returns or raises."""

from __future__ import annotations

import contextlib
import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from stager import load_checkpoint
from stager.cli.entry import entries_of
from stager.cli.foreign import inspect_foreign
from stager.cli.inspect import _print as print_inspect
from stager.cli.inspect import facts_of
from stager.cli.ls import _print_table as print_table
from stager.cli.ls import list_rows
from stager.cli.verify_command import _print as print_verify
from stager.cli.verify_command import run_verify
from stager.config import LoadingConfig
from stager.exporting.export import export_checkpoint
from stager.loading.loader import Loader
from stager.loading.place import Run
from stager.torch_api.storage import StagerStorageReader
from stager.workers.checkpoint.directory.manifest_file import read_manifest
from stager.workers.checkpoint.directory.run_directory import list_checkpoints
from stager.workers.checkpoint.maintenance.recover import recover
from stager.workers.checkpoint.read.verify import verify_checkpoint
from tests.safety.targets import FILE_NAME, STATE, STEP, checkpoint


def _loader(run_dir: Path, verify: str = "full") -> Loader:
    return Loader(Run(str(run_dir)), LoadingConfig(threads=1, verify=verify))


def _target() -> dict[str, Any]:
    return {
        "model": torch.nn.Linear(3, 2),
        "a": torch.zeros(2, 3),
        "b": [torch.tensor(0), {"c": torch.empty(0, 3), 3: torch.zeros(4, dtype=torch.bfloat16)}],
        "rest": {"o": None, "sparse": STATE["rest"]["sparse"].clone()},
    }


def _inspect(run_dir: Path) -> None:
    manifest = read_manifest(checkpoint(run_dir))
    with contextlib.redirect_stdout(io.StringIO()):
        print_inspect(facts_of(str(checkpoint(run_dir)), manifest), list(entries_of(manifest)), 20)


def _inspect_foreign(path: Path) -> None:
    facts, entries = inspect_foreign(str(path))
    with contextlib.redirect_stdout(io.StringIO()):
        print_inspect(facts, entries, 20)


def _export(run_dir: Path, file_format: str) -> None:
    export_checkpoint(checkpoint(run_dir), run_dir / "exported", file_format=file_format, force=True)


def _ls(run_dir: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        print_table(str(run_dir), list_rows(str(run_dir)))


def _cli_verify(run_dir: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        for result in run_verify([str(checkpoint(run_dir))], False, 1):
            print_verify(result, False)


def _dcp_load(path: Path) -> None:
    reader = StagerStorageReader(path, num_threads=1)
    metadata = reader.read_metadata()
    state: dict[str, Any] = {"a": torch.zeros(2, 3), "model": {"weight": torch.zeros(2, 3)}, "z": torch.zeros(4, 3)}
    state = {key: value for key, value in state.items() if key in metadata.state_dict_metadata or key == "model"}
    if "model.weight" not in metadata.state_dict_metadata:
        state.pop("model")
    if "o.lr" in metadata.state_dict_metadata:
        state["o"] = {"lr": 0.0}
    reader = StagerStorageReader(path, num_threads=1)
    try:
        dcp.load(state, storage_reader=reader, no_dist=True)
    except dcp.api.CheckpointException as error:
        raise error.failures[0][0] from error


def _dcp_load_all(path: Path) -> None:
    """As a converter does that takes memory for whatever the metadata says."""
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    StagerStorageReader(path, num_threads=1).read_metadata()
    try:
        _load_state_dict(
            {}, StagerStorageReader(path, num_threads=1), planner=_EmptyStateDictLoadPlanner(), no_dist=True
        )
    except dcp.api.CheckpointException as error:
        raise error.failures[0][0] from error


OPENINGS: dict[str, Callable[[Path], object]] = {
    "list": list_checkpoints,
    "ls": _ls,
    "inspect": _inspect,
    "verify": lambda run_dir: verify_checkpoint(checkpoint(run_dir), num_threads=1),
    "quick verify": lambda run_dir: verify_checkpoint(checkpoint(run_dir), full=False, num_threads=1),
    "stager verify": _cli_verify,
    "latest": lambda run_dir: _loader(run_dir).latest(),
    "load": lambda run_dir: _loader(run_dir, "quick").load(None, None, strict=True, allow_pickle=None),
    "load step": lambda run_dir: _loader(run_dir).load(STEP, None, strict=True, allow_pickle=None),
    "load into": lambda run_dir: _loader(run_dir, "quick").load(STEP, _target(), strict=True, allow_pickle=None),
    "load into, not strict": lambda run_dir: _loader(run_dir, "quick").load(
        STEP, _target(), strict=False, allow_pickle=None
    ),
    "recover": lambda run_dir: recover(str(run_dir)),
    "dcp.load": lambda run_dir: _dcp_load(checkpoint(run_dir)),
    "dcp.load of all": lambda run_dir: _dcp_load_all(checkpoint(run_dir)),
    "export to torch": lambda run_dir: _export(run_dir, "torch"),
    "export to safetensors": lambda run_dir: _export(run_dir, "safetensors"),
    "load_checkpoint": lambda run_dir: load_checkpoint(checkpoint(run_dir)),
    "load chunks into": lambda run_dir: load_checkpoint(checkpoint(run_dir), {"z": torch.zeros(3, 4).t()}),
    "file: load_checkpoint": lambda run_dir: load_checkpoint(run_dir / FILE_NAME),
    "file: load into": lambda run_dir: load_checkpoint(run_dir / FILE_NAME, _target()),
    "file: inspect": lambda run_dir: _inspect_foreign(run_dir / FILE_NAME),
    "stock: load_checkpoint": lambda run_dir: load_checkpoint(run_dir / "stock"),
    "stock: load into": lambda run_dir: load_checkpoint(
        run_dir / "stock", {key: value for key, value in _target().items() if key != "rest"}, strict=False
    ),
    "stock: inspect": lambda run_dir: _inspect_foreign(run_dir / "stock"),
    "stock dcp.load": lambda run_dir: _dcp_load(run_dir / "stock"),
    "stock dcp.load of all": lambda run_dir: _dcp_load_all(run_dir / "stock"),
}

_STOCK = [name for name in OPENINGS if name.startswith("stock")]
_FILE = [name for name in OPENINGS if name.startswith("file")]
_WHOLE = [name for name in OPENINGS if name not in (*_STOCK, *_FILE, "recover", "load chunks into")]
_CHUNKS = ["load chunks into", *(name for name in _WHOLE if not name.startswith("load into"))]


def openings_of(target: str) -> list[str]:
    """All that make sense for a target."""
    if target in ("record", "receipts", "unnamed"):
        return ["recover", "latest", "load", "ls"]
    return {
        "stock": _STOCK,
        "torch.save": _FILE,
        "torch.save, no archive": _FILE,
        "state.pt": _FILE,
        "state.safetensors": _FILE[:1] + _FILE[2:],
        "chunks": _CHUNKS,
    }.get(target, _WHOLE)


def draw_openings(rng: random.Random, target: str) -> list[str]:
    if target in ("record", "receipts", "unnamed"):
        return ["recover", rng.choice(("latest", "load", "ls", "verify"))]
    openings = openings_of(target)
    return rng.sample(openings, min(3, len(openings)))
