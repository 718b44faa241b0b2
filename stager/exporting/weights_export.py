"""What an export of weights is asked to do, apart from the checkpoint: the arguments of ``export_weights()`` as a value.

made       by the user, or by ``export_weights()``: what is wrong with an argument by itself is said
resolved   for one save, or for the one export: paths are absolute, and ``out`` may be written
run        by ``weights.py``, in a worker if a save asked for it
"""

from __future__ import annotations

import errno
import os
import re
import shlex
import string
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields, replace

import torch

from stager.config.arguments import as_bytes
from stager.config.host import reading_threads
from stager.exporting.conversion import dtype_named
from stager.exporting.memory_budget import MemoryBudget
from stager.exporting.new_directory import refuse_if_taken
from stager.exporting.part import Part
from stager.exporting.sidecars import sidecars_of
from stager.exporting.weight_names import Rename, check_rename
from stager.workers.checkpoint.storage.paths import local_path
from stager.workers.checkpoint.storage.posix.files import storage_errors
from stager.workers.errors import ArgumentError

_SPEC = re.compile(r"(?:0[1-9][0-9]?)?d?")  # as in persistence.name: {step}, {step:08d}


@dataclass(frozen=True, slots=True)
class WeightsExport:
    """An export of weights that ``save(export=...)`` asks for. It is made when the checkpoint is committed.

    Attributes:
        out: the directory; it appears when it is whole. ``{step}`` in it becomes the step of the save, ``{step:08d}`` the
            step with leading zeros; ``{{`` and ``}}`` become braces. The directory that it lies in must exist.
        keys, strip_prefix, rename, dtype, max_shard_bytes, sidecars, max_memory_bytes, force: as of
            :func:`~stager.export_weights`. A function given as ``rename`` runs in a worker process.

    Raises:
        ArgumentError, UsageError: an argument cannot be meant.
    """

    out: str | os.PathLike[str]
    _: KW_ONLY
    keys: str | Sequence[str] | None = None
    strip_prefix: str | None = None
    rename: Rename | None = None
    dtype: str | torch.dtype | None = None
    max_shard_bytes: int | str = "5GB"
    sidecars: Sequence[str | os.PathLike[str]] = ()
    max_memory_bytes: int | str = 1 << 30
    force: bool = False

    def __post_init__(self) -> None:
        local_path(self.out, "out")
        check_rename(self.rename)
        dtype_named(self.dtype)
        part_of(self)
        shard_bytes_of(self)
        budget_of(self)


def part_of(export: WeightsExport) -> Part:
    """Return which part of the checkpoint is exported."""
    return Part.of_arguments(export.keys, export.strip_prefix)


def shard_bytes_of(export: WeightsExport) -> int:
    """Return the most bytes of tensors in a file."""
    if not (nbytes := as_bytes(export.max_shard_bytes, "max_shard_bytes")):
        raise ArgumentError("max_shard_bytes is 0; give the size of a file of weights, such as 5GB")
    return nbytes


def budget_of(export: WeightsExport) -> MemoryBudget:
    """Return the memory for data, divided."""
    return MemoryBudget.of_threads(as_bytes(export.max_memory_bytes, "max_memory_bytes"), reading_threads())


def resolved(export: WeightsExport, step: int | None = None) -> WeightsExport:
    """Return the export with absolute paths, and copies of what the caller may change later.

    Args:
        step: takes the place of ``{step}`` in ``out``. None: ``out`` is taken as it is.

    Raises:
        ArgumentError: ``out`` has braces in it that stand for no step.
        UsageError: ``out`` is taken, or a file of ``sidecars`` is missing.
        StorageError: the directory that ``out`` lies in does not exist.
    """
    out = local_path(export.out, "out")
    if step is not None:
        out = _of_step(out, step)
    refuse_if_taken(out, force=export.force)
    with storage_errors("write", out):
        if not os.path.isdir(os.path.dirname(out)):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), out)
    return replace(
        export,
        out=out,
        keys=export.keys if export.keys is None or isinstance(export.keys, str) else tuple(export.keys),
        rename=dict(export.rename) if isinstance(export.rename, Mapping) else export.rename,
        sidecars=tuple(one.path for one in sidecars_of(export.sidecars)),
    )


def _of_step(out: str, step: int) -> str:
    """Put a step into ``out``."""
    try:
        parts = list(string.Formatter().parse(out))
    except ValueError as error:
        raise ArgumentError(_wrong_braces(out, str(error))) from error
    for _, name, spec, conversion in parts:
        if name is not None and (name != "step" or conversion or _SPEC.fullmatch(spec or "") is None):
            field = name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            raise ArgumentError(_wrong_braces(out, f"{{{field}}} is nothing that an export knows"))
    return out.format(step=step)


def _wrong_braces(out: str, why: str) -> str:
    return (
        f"out is {out!r}: {why}; write {{step}}, or {{step:08d}} for leading zeros, and {{{{ }}}} for braces in a name"
    )


def command_of(export: WeightsExport, checkpoint: str) -> str:
    """Return the command that makes this export. It has NAMES in the place of ``rename``.

    Args:
        checkpoint: its path.
    """
    keys = [export.keys] if isinstance(export.keys, str) else export.keys or ()
    given = {one.name for one in fields(export) if getattr(export, one.name) != one.default}
    sizes = (("max_shard_bytes", "--max-shard-size"), ("max_memory_bytes", "--max-memory"))
    options = [
        *(("--keys", key) for key in keys),
        *([("--strip-prefix", export.strip_prefix)] if export.strip_prefix else []),
        *([("--rename", "NAMES")] if export.rename is not None else []),
        *([("--dtype", dtype)] if (dtype := dtype_named(export.dtype)) is not None else []),
        *((option, str(getattr(export, name))) for name, option in sizes if name in given),
        *(("--file", os.fspath(path)) for path in export.sidecars),
    ]
    words = ["stager", "export", checkpoint, os.fspath(export.out), "--layout", "hf"]
    words += [word for option in options for word in option]
    return shlex.join([*words, "--force"] if export.force else words)
