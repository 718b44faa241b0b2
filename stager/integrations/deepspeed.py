"""DeepSpeed: what ``engine.save_checkpoint()`` saves, written by stager's workers while training goes on.

    engine, optimizer, _, _ = deepspeed.initialize(...)
    checkpoints = stager.integrations.deepspeed.use(engine)

    engine.save_checkpoint
    |-- create              counts the save
    |-- save, save, ...     a snapshot of each file of this rank; the workers write it
    `-- commit              hands them to the publisher: deepspeed_parts/publisher.py, NOTE [ One commit per tag ]
    engine.load_checkpoint  waits for saves in flight, then loads, as always; load: checks hashes, then torch.load()

A tag has the files that DeepSpeed's own engine would write, under the same names, and beside them ``.stager`` with the
manifest of each: the hashes of its bytes. So everything that reads DeepSpeed's checkpoints reads these.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from typing_extensions import Self

from stager.config import StagerConfig, arguments, load_config
from stager.integrations.deepspeed_parts.area import MANIFESTS, Area, is_half_replaced, manifest_name, remove_remains
from stager.integrations.deepspeed_parts.publisher import Publisher, TagSave
from stager.path_checkpointer import PathCheckpointer
from stager.saving.save import SaveHandle
from stager.workers.checkpoint.documents.manifest import Manifest, parse_manifest
from stager.workers.checkpoint.documents.names import number_in
from stager.workers.checkpoint.layout.layout import FileSpec
from stager.workers.checkpoint.read.verify import check_files
from stager.workers.checkpoint.storage.paths import local_path
from stager.workers.checkpoint.storage.posix import files
from stager.workers.errors import (
    ArgumentError,
    CheckpointNotFoundError,
    ClosedError,
    ConfigError,
    CorruptCheckpointError,
    UsageError,
)

logger = logging.getLogger("stager")

Config = str | os.PathLike[str] | Mapping[str, Any] | StagerConfig | None
"""What a ``PathCheckpointer`` takes as its configuration."""


def use(engine: Any, config: Config = None, *, guard: bool = True) -> StagerCheckpointEngine:
    """Let stager save and load the checkpoints of a DeepSpeed engine. Every rank calls it, after ``initialize()``.

    ``engine.save_checkpoint()`` then returns when the snapshots are taken. ``latest`` names a tag only when all files of all
    ranks are there. ``engine.load_checkpoint()`` waits for saves in flight, and reads what DeepSpeed has written, too.

    Args:
        engine: what ``deepspeed.initialize()`` returns first.
        config: as of :class:`stager.PathCheckpointer`. ``persistence.format`` is ``torch``, and each rank saves for itself.
        guard: copy what DeepSpeed's inner optimizer holds while training goes on (:meth:`stager.Checkpointer.guard`). Only
            the optimizer's step may then write to it between two steps.

    Returns:
        The checkpoint engine. Call its ``close()`` at the end, on every rank.

    Raises:
        ConfigError: stager's configuration is wrong, or sets another format; or DeepSpeed's has a ``checkpoint.writer``,
            ``use_node_local_storage``, or an optimizer that is offloaded to NVMe.
        UsageError: stager saves for this engine already; or, with ``guard``, ZenFlow steps in another process.
        ArgumentError: with ``guard``, an optimizer that cannot be guarded.
        Exception: as of :class:`stager.PathCheckpointer`.
    """
    _refuse(engine, guard)
    ours = StagerCheckpointEngine(config)
    try:
        if guard and engine.optimizer is not None:
            ours.checkpointer.guard(engine.optimizer)
    except BaseException:
        ours.close()
        raise
    if isinstance(engine.checkpoint_engine, StagerCheckpointEngine):  # a closed one
        del engine.save_checkpoint, engine.load_checkpoint
    engine.checkpoint_engine = ours
    engine.save_checkpoint = _saving(engine.save_checkpoint, ours)
    engine.load_checkpoint = _loading(engine.load_checkpoint, ours)
    return ours


def verify(directory: str | os.PathLike[str], *, full: bool = True) -> list[str]:
    """Check a tag that stager has written, ``SAVE_DIR/TAG``.

    Args:
        full: hash every byte; otherwise compare sizes only.

    Returns:
        A line for each problem: a file that is missing, too short or damaged.

    Raises:
        ArgumentError: it has no manifests: DeepSpeed's own engine has written it, or it is no tag.
    """
    path = local_path(directory, "directory")
    manifests = os.path.join(path, MANIFESTS)
    if not os.path.isdir(manifests):
        raise ArgumentError(f"{path} has no {MANIFESTS} directory, so stager has not written it; give SAVE_DIR/TAG")
    problems = []
    for found in sorted(os.listdir(manifests)):
        problems += _problems(path, found.removeprefix("manifest-").removesuffix(".json"), full)
    return problems


class StagerCheckpointEngine(CheckpointEngine):
    """DeepSpeed's ``CheckpointEngine``, with files that stager's workers write. :func:`use` makes one.

    DeepSpeed has no setting that names a class for it; ``engine.checkpoint_engine`` may be set. :func:`use` does that, and
    sees to ``latest``, which DeepSpeed itself would write before the files are there. Where only the attribute is set,
    ``commit()`` waits until they are.

    Args:
        config: as of :func:`use`.

    Attributes:
        checkpointer: the :class:`stager.PathCheckpointer` of this rank's files, for ``listen()`` and ``warmup()``.
        is_closed: whether ``close()`` was called.

    Raises:
        Exception: as of :func:`use`.
    """

    checkpointer: PathCheckpointer

    def __init__(self, config: Config = None) -> None:
        super().__init__(None)
        self.name = "StagerCheckpointEngine"
        self._config = _config(load_config(config))
        self._rank, self._num_ranks, self._run = _agree()
        self.checkpointer = PathCheckpointer(self._config)
        persistence = self._config.persistence
        self._publisher = Publisher(self._config.ranks.timeout_secs, persistence.fsync)
        self._areas: set[str] = set()
        self._number = 0
        self._info: Any = None
        self._begun: dict[str, tuple[str, SaveHandle]] = {}  # by the file's path from save_dir: where it is written
        self._is_latest = False  # of the save that comes
        self._published: list[Future[None]] = []
        self.is_closed = False

    # -- saving: what DeepSpeed calls, on every rank, as often on one as on another -----------------------------

    def create(self, info: Any) -> None:
        """Begin a save. What an earlier ``save_checkpoint()`` has begun and, for an error, not ended is taken back."""
        if self.is_closed:
            raise ClosedError("the StagerCheckpointEngine is closed; call use(engine) again to save more")
        self._raise_failures()
        self._take_back()
        self._number += 1
        self._info = replace(info, save_dir=local_path(info.save_dir, "save_dir"))

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make a directory, unless it is the tag's: that one appears when it is whole."""
        if self._info is None or not _is_in(path, os.path.join(self._info.save_dir, self._info.tag)):
            os.makedirs(path, exist_ok=exist_ok)

    def save(self, state_dict: Any, path: str) -> None:
        """Take a snapshot of a file's content, and let the workers write it.

        Raises:
            UsageError: not called between ``create()`` and ``commit()``.
            ArgumentError: a file that is neither in the tag's directory nor in that of the checkpoints.
            Exception: as of :meth:`stager.PathCheckpointer.save`.
        """
        if self._info is None:
            raise UsageError("save() was called before create(); call engine.save_checkpoint(), which calls both")
        area, name = self._area(self._info.save_dir), os.path.relpath(local_path(path, "path"), self._info.save_dir)
        if os.path.dirname(name) not in ("", os.path.normpath(self._info.tag)):
            raise ArgumentError(
                f"{path} is neither in {self._info.save_dir} nor in its directory {self._info.tag}; save it yourself"
            )
        written = area.written(area.rank, self._number, os.path.basename(name))
        step = number_in(self._info.tag) or 0
        self._begun[name] = written, self.checkpointer.save(written, state_dict, step=step)

    def commit(self, info: Any) -> bool:
        """End a save: publish the files when they are written.

        Waits for that if DeepSpeed is going to write ``latest`` itself, and for a file beside the tags
        (``save_16bit_model()``), which the caller may read at once.

        Raises:
            Exception: when it waits, the error of this save.
        """
        if self._info is None:
            raise UsageError("commit() was called before create(); call engine.save_checkpoint(), which calls both")
        ended, begun, is_latest = self._info, self._begun, self._is_latest
        self._info, self._begun, self._is_latest = None, {}, False
        handles = {name: handle for name, (_, handle) in begun.items()}
        save = TagSave(self._area(ended.save_dir), self._number, os.path.normpath(ended.tag), handles, is_latest)
        future = self._publisher.publish(save)
        if info.save_latest or not all(map(os.path.dirname, handles)):
            future.result()
        else:
            self._published.append(future)
        return True

    def preserves_storage_sharing(self) -> bool:
        """No: a view is stored without the rest of its memory, so DeepSpeed need not clone it first."""
        return False

    def _take_back(self) -> None:
        begun, self._begun, self._info = self._begun, {}, None
        for written, _ in begun.values():
            with suppress(CheckpointNotFoundError):
                self.checkpointer.delete(written)

    def _area(self, save_dir: str) -> Area:
        area = Area(save_dir, self._run, self._rank, self._num_ranks)
        if save_dir not in self._areas:
            remove_remains(area, self.checkpointer.recover)
            self._areas.add(save_dir)
        return area

    # -- loading ------------------------------------------------------------------------------------------------

    def _settle(self, load_dir: str) -> None:
        """Wait on all ranks until no save is in flight, and nothing is between its two names."""
        self.wait()
        if self._rank == 0 and is_half_replaced(load_dir):
            self._area(load_dir)
        if self._num_ranks > 1:
            dist.barrier()

    def load(self, path: str, map_location: Any = None) -> Any:
        """Load a file as DeepSpeed's own engine does; one that stager has written is first compared with its hashes.

        Raises:
            CorruptCheckpointError: it is damaged.
            Exception: as of ``torch.load()``, which runs code that the file holds.
        """
        self.wait()
        directory, name = os.path.split(local_path(path, "path"))
        problems = _problems(directory, name, self._config.loading.verify == "full")
        if problems:
            raise CorruptCheckpointError(
                path, f"is damaged; load an older one with load_checkpoint(dir, tag): {'; '.join(problems)}"
            )
        return torch.load(path, map_location=map_location, weights_only=False)

    # -- the end ------------------------------------------------------------------------------------------------

    def wait(self, timeout: float | None = None) -> None:
        """Wait until every save that was begun is published, on all ranks.

        Raises:
            TimeoutError: not within ``timeout`` seconds.
            Exception: the oldest error of a save that nobody has looked at.
        """
        arguments.check_secs(timeout)
        deadline = None if timeout is None else time.monotonic() + timeout
        for future in self._published:
            future.exception(None if deadline is None else max(0.0, deadline - time.monotonic()))
        self._raise_failures()

    def _raise_failures(self) -> None:
        ended = [future for future in self._published if future.done()]
        self._published = [future for future in self._published if not future.done()]
        errors = [error for future in ended if (error := future.exception()) is not None]
        if not errors:
            return
        if self._config.persistence.on_save_error == "raise":
            raise errors[0]
        for error in errors:
            logger.error("a checkpoint was not published: %s", error)

    def close(self, timeout: float | None = None) -> None:
        """Finish every save that was begun, then stop the workers and free the memory. Idempotent. Every rank calls it.

        Args:
            timeout: seconds to wait for saves in flight; those not written by then fail.

        Raises:
            Exception: the oldest error of a save that nobody has looked at.
        """
        if self.is_closed:
            return
        self.is_closed = True
        try:
            self.wait(timeout)
        except TimeoutError:
            self.checkpointer.close(0)
            self._publisher.give_up()
            raise
        finally:
            self._publisher.close()
            self.checkpointer.close()

    def cleanup(self) -> None:
        """Do what :meth:`close` does."""
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close()
        except Exception:  # the error of the with block is raised; this one is only logged
            logger.exception("closing the StagerCheckpointEngine failed as well, after an error in its with block")


# -- what is around DeepSpeed's methods, and refused -------------------------------------------------------------------


def _saving(save_checkpoint: Callable[..., Any], ours: StagerCheckpointEngine) -> Callable[..., Any]:
    """Let the publisher write ``latest``: DeepSpeed writes it when it has called ``commit()``, which does not wait."""
    signature = inspect.signature(save_checkpoint)

    @functools.wraps(save_checkpoint)
    def saving(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        ours._is_latest = bool(given.arguments["save_latest"])
        given.arguments["save_latest"] = False
        return save_checkpoint(*given.args, **given.kwargs)

    return saving


def _loading(load_checkpoint: Callable[..., Any], ours: StagerCheckpointEngine) -> Callable[..., Any]:
    """Let every rank read the same ``latest``."""
    signature = inspect.signature(load_checkpoint)

    @functools.wraps(load_checkpoint)
    def loading(*args: Any, **kwargs: Any) -> Any:
        ours._settle(local_path(signature.bind(*args, **kwargs).arguments["load_dir"], "load_dir"))
        return load_checkpoint(*args, **kwargs)

    return loading


def _agree() -> tuple[int, int, str]:
    """Return this rank, the number of ranks, and a name for this run, which is the same on all of them."""
    names = [uuid.uuid4().hex[:8]]
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1, names[0]
    dist.broadcast_object_list(names, src=0)
    return dist.get_rank(), dist.get_world_size(), names[0]


def _problems(directory: str, name: str, full: bool) -> list[str]:
    """Compare a file of a tag with its manifest. A file that has none has no problems."""
    path = os.path.join(directory, MANIFESTS, manifest_name(name))
    data = files.read_if_exists(path)
    if data is None:
        return []
    try:
        written = parse_manifest(data, path)
    except CorruptCheckpointError as error:
        return [str(error)]
    # The manifest calls the file as it was called when it was written.
    layout = replace(written.layout, files=(FileSpec(name, written.layout.files[0].nbytes),))
    manifest: Manifest = replace(written, layout=layout)
    return check_files(directory, manifest, full=full)


def _is_in(path: str, directory: str) -> bool:
    found, at = os.path.abspath(path), os.path.abspath(directory)
    return found == at or found.startswith(at + os.sep)


def _config(given: StagerConfig) -> StagerConfig:
    if given.persistence.format == "safetensors":
        raise ConfigError(
            "persistence.format is safetensors, and DeepSpeed's files are of torch.save; take it out, or set it to torch"
        )
    if given.ranks.together is True:
        raise ConfigError(
            "ranks.together is true, and each rank of DeepSpeed saves files of its own; take it out, or set it to false"
        )
    if given.arena.when_full == "skip":
        raise ConfigError("arena.when_full is skip, and a tag needs all of its files; set it to wait or raise")
    return load_config(given, ["ranks.together=false", "persistence.format=torch", "loading.allow_pickle=true"])


def _refuse(engine: Any, guard: bool) -> None:
    found = getattr(engine, "checkpoint_engine", None)
    if isinstance(found, StagerCheckpointEngine) and not found.is_closed:
        raise UsageError("stager saves for this engine already; call use(engine) once, or close() the first one before")
    if found is None:
        raise UsageError(
            f"use() takes the engine that deepspeed.initialize() returns first, and got a {type(engine).__name__}"
        )
    if not isinstance(found, TorchCheckpointEngine | StagerCheckpointEngine):
        raise ConfigError(
            f"DeepSpeed's configuration chooses its {type(found).__name__}, which decides on other ranks' files; take "
            "checkpoint.writer and datastates_ckpt out of it"
        )
    if engine.use_node_local_storage():
        raise ConfigError(
            "checkpoint.use_node_local_storage is on, and stager publishes the files of all ranks in one directory; turn it "
            "off, and save to a file system that all nodes see"
        )
    if engine.zero_nvme_offload_optimizer():
        raise ConfigError(
            "the optimizer is offloaded to NVMe, whose files DeepSpeed copies into the tag itself; offload it to the CPU, "
            "or save without stager"
        )
    if guard and getattr(engine, "zenflow", False):
        raise UsageError("ZenFlow steps beside the training loop, so its optimizer cannot be guarded; give guard=False")
