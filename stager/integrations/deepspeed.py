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

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from typing_extensions import Self

from stager.config import StagerConfig, arguments, load_config
from stager.integrations.deepspeed_parts.area import (
    MANIFESTS,
    Area,
    is_half_replaced,
    remove_remains,
)
from stager.integrations.deepspeed_parts.engine_methods import stand_around
from stager.integrations.deepspeed_parts.engine_ranks import EngineRanks, Said
from stager.integrations.deepspeed_parts.publisher import Publisher, TagSave
from stager.integrations.deepspeed_parts.saves_in_flight import SavesInFlight
from stager.integrations.deepspeed_parts.settings import refuse_engine, settings
from stager.integrations.deepspeed_parts.tag_hashes import hashed_files, problems_of
from stager.integrations.deepspeed_parts.tag_names import check_tag, is_in
from stager.path_checkpointer import PathCheckpointer
from stager.saving.save import SaveHandle
from stager.workers.checkpoint.documents.names import number_in
from stager.workers.checkpoint.storage.paths import local_path
from stager.workers.checkpoint.storage.posix.files import storage_errors
from stager.workers.errors import (
    ArgumentError,
    CheckpointNotFoundError,
    ClosedError,
    ConfigError,
    CorruptCheckpointError,
    InconsistentRanksError,
    StagerError,
    UsageError,
)

logger = logging.getLogger("stager")

_TALK_SECS = 0.25

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
        ConfigError: stager's configuration is wrong, or sets what DeepSpeed's files rule out; or DeepSpeed's configuration
            has a ``checkpoint.writer``, ``use_node_local_storage``, or an optimizer that is offloaded to NVMe.
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
    engine.checkpoint_engine = ours
    stand_around(engine, ours)
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
    if not os.path.isdir(os.path.join(path, MANIFESTS)):
        raise ArgumentError(f"{path} has no {MANIFESTS} directory, so stager has not written it; give SAVE_DIR/TAG")
    return [problem for name in hashed_files(path) for problem in problems_of(path, name, full=full)]


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
        self._config = settings(load_config(config))
        self._ranks = EngineRanks(self._config.persistence.on_save_error == "raise")
        self.checkpointer = PathCheckpointer(self._config)
        persistence = self._config.persistence
        self._publisher = Publisher(self._config.ranks.timeout_secs, persistence.fsync)
        self._in_flight = SavesInFlight()
        self._areas: set[str] = set()
        self._number = 0
        self._info: Any = None
        self._begun: dict[str, tuple[str, SaveHandle]] = {}  # by the file's path from save_dir: where it is written
        self._is_tag = False  # of the save that was begun: it is not a file beside the tags
        self._error: Exception | None = None  # of the save that was begun, on this rank
        self._is_latest = False  # of the save that comes
        self._checked: frozenset[str] = frozenset()  # files of the tag that is being loaded
        self.is_closed = False

    # -- saving: what DeepSpeed calls, on every rank, as often on one as on another -----------------------------
    #
    # deepspeed_parts/engine_ranks.py, NOTE [ All ranks raise in the same call ]: create() and commit() raise, and what is
    # called between the two by some ranks only does not.

    def expect_save(self, is_latest: bool) -> None:
        """Take note that DeepSpeed begins ``save_checkpoint()``, and whether ``latest`` is to name the tag."""
        self._is_latest, self._error = is_latest, None

    def create(self, info: Any) -> None:
        """Begin a save. What an earlier ``save_checkpoint()`` has begun and, for an error, not ended is taken back.

        Raises:
            Exception: on all ranks, the error of an earlier save, or why this one cannot begin on one of them.
        """
        self._number += 1
        failures = self._in_flight.take_failures()
        with self.erring():
            self._begin(info)
        tags = self._raise_together(failures, self._taken_error(), str(info.tag))
        if len(set(tags)) > 1:
            raise InconsistentRanksError(
                f"the ranks save different tags, {', '.join(map(repr, dict.fromkeys(tags)))}; give all the same one"
            )
        self._info = replace(info, save_dir=local_path(info.save_dir, "save_dir"))

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make a directory, unless it is the tag's: that one appears when it is whole."""
        if self._info is not None and is_in(path, os.path.join(self._info.save_dir, self._info.tag)):
            self._is_tag = True
            return
        with self.erring(), storage_errors("create", path):
            os.makedirs(path, exist_ok=exist_ok)

    def save(self, state_dict: Any, path: str) -> None:
        """Take a snapshot of a file's content, and let the workers write it. If that fails, ``commit()`` raises.

        Raises:
            UsageError: not called between ``create()`` and ``commit()``.
        """
        if self._info is None:
            raise UsageError("save() was called before create(); call engine.save_checkpoint(), which calls both")
        if self._error is None:
            with self.erring():
                self._write(state_dict, local_path(path, "path"))

    def commit(self, info: Any) -> bool:
        """End a save: publish the files when they are written.

        Waits for that if DeepSpeed is going to write ``latest`` itself, and for a file beside the tags
        (``save_16bit_model()``), which the caller may read at once. Then it waits on all ranks.

        Raises:
            Exception: on all ranks, if a file cannot be saved on one of them; and, when it waits, if it is not written.
        """
        if self._info is None:
            raise UsageError("commit() was called before create(); call engine.save_checkpoint(), which calls both")
        with self.erring():
            self._area(self._info.save_dir)  # locks it, also for a rank that has no files
        try:
            is_tag = any(self._raise_together({}, self._taken_error(), self._is_tag))
        except Exception:
            self._take_back_or_log()
            raise
        future = self._publisher.publish(self._ended(is_tag))
        if is_tag and not info.save_latest:
            self._in_flight.add(self._number, future)
        else:
            waited = SavesInFlight()
            waited.add(self._number, future)
            failures = self._end_together(waited)
            self._raise_together({}, failures.get(self._number))
        return True

    def preserves_storage_sharing(self) -> bool:
        """No: a view is stored without the rest of its memory, so DeepSpeed need not clone it first."""
        return False

    @contextmanager
    def erring(self) -> Iterator[None]:
        """Keep an error of this rank until ``commit()``, or ``create()`` if that comes first, where all ranks raise it."""
        try:
            yield
        except Exception as error:  # noqa: BLE001  # all ranks raise it
            self._error = self._error or error

    def _begin(self, info: Any) -> None:
        if self.is_closed:
            raise ClosedError("the StagerCheckpointEngine is closed; call use(engine) again to save more")
        self._take_back()
        check_tag(local_path(info.save_dir, "save_dir"), info.tag)

    def _write(self, state_dict: Any, path: str) -> None:
        save_dir, tag = self._info.save_dir, os.path.normpath(self._info.tag)
        area, name = self._area(save_dir), os.path.relpath(path, save_dir)
        if self._is_tag and os.path.dirname(name) != tag:
            raise ArgumentError(f"{path} is not in the directory {tag} of {save_dir}; save it yourself")
        written = area.written(area.rank, self._number, os.path.basename(name))
        step = number_in(self._info.tag) or 0
        self._begun[name] = written, self.checkpointer.save(written, state_dict, step=step)

    def _ended(self, is_tag: bool) -> TagSave:
        """Return the save that was begun, for the publisher; the next one may begin."""
        info, begun = self._info, self._begun
        self._info, self._begun = None, {}
        handles = {name: handle for name, (_, handle) in begun.items()}
        is_latest = is_tag and self._is_latest
        return TagSave(self._area(info.save_dir), self._number, os.path.normpath(info.tag), handles, is_tag, is_latest)

    def _take_back(self) -> None:
        begun, self._begun, self._info, self._is_tag = self._begun, {}, None, False
        for written, _ in begun.values():
            with suppress(CheckpointNotFoundError):
                self.checkpointer.delete(written)

    def _take_back_or_log(self) -> None:
        try:
            self._take_back()
        except StagerError:  # another error is raised
            logger.exception("the files of a save that failed could not be removed")

    def _taken_error(self) -> Exception | None:
        error, self._error = self._error, None
        return error

    def _raise_together(
        self, failures: Mapping[int, BaseException], error: BaseException | None, detail: Any = None
    ) -> list[Any]:
        """Raise on all ranks what any of them has to, or return what each rank adds. Every rank calls it at the same place.

        Args:
            failures: of earlier saves, by number; the oldest one comes first.
            error: why this call fails on this rank.
        """
        said = self._say(failures, error, detail)
        if said.failure is not None:
            self._raise_or_log(said.failure)
        if said.error is not None:
            raise said.error
        return said.details

    def _raise_or_log(self, failure: BaseException) -> None:
        if self._ranks.raises:
            raise failure
        logger.error("a checkpoint was not published: %s", failure)

    def _end_together(self, in_flight: SavesInFlight) -> dict[int, BaseException]:
        """Wait on all ranks until these saves have ended. Returns the errors, and those that other ranks have told."""
        failures: dict[int, BaseException] = {}
        have_ended = False
        while (
            not have_ended
        ):  # now and then all ranks talk: one may wait for another that has failed and cannot report it
            with suppress(TimeoutError):
                in_flight.wait(_TALK_SECS)
            failures |= in_flight.take_failures()
            said = self._say(failures, None, not in_flight)
            in_flight.tell(said.failed)
            have_ended = all(said.details)
        return failures

    def _say(self, failures: Mapping[int, BaseException], error: BaseException | None, detail: Any) -> Said[Any]:
        said = self._ranks.say(failures, error, detail)
        self._in_flight.tell(said.failed)
        self._publisher.give_up(said.failed)
        return said

    def _area(self, save_dir: str) -> Area:
        area = Area(save_dir, self._ranks.run, self._ranks.own, self._ranks.count)
        if save_dir not in self._areas:
            remove_remains(area, self.checkpointer.recover)
            self._areas.add(save_dir)
        return area

    # -- loading ------------------------------------------------------------------------------------------------

    def settle(self, load_dir: str) -> None:
        """Wait on all ranks until no save is in flight, and nothing is between its two names."""
        failures, self._error = self._end_together(self._in_flight), None
        with self.erring():
            if self._ranks.own == 0 and is_half_replaced(load_dir):
                self._area(load_dir)
        self._raise_together(failures, self._taken_error())

    @contextmanager
    def checked_together(self, directory: str, is_needed: Callable[[str], bool]) -> Iterator[None]:
        """Compare the files of a tag with their hashes, each on one of the ranks, before any rank loads one.

        DeepSpeed has collectives between the files that a rank loads: an error there would put the ranks out of step.
        """
        names: list[str] = []
        damage: CorruptCheckpointError | None = None
        with self.erring():
            names = [name for name in hashed_files(directory) if is_needed(name)]
            try:
                for name in names[self._ranks.own :: self._ranks.count]:
                    self._check(os.path.join(directory, name))
            except CorruptCheckpointError as error:
                damage = error
        for found in self._raise_together({}, self._taken_error(), damage):
            if found is not None:  # the same type on all ranks: who catches it loads an older tag
                raise found
        self._checked = frozenset(os.path.join(directory, name) for name in names)
        try:
            yield
        finally:
            self._checked = frozenset()

    def _check(self, path: str) -> None:
        problems = problems_of(*os.path.split(path), full=self._config.loading.verify == "full")
        if problems:
            raise CorruptCheckpointError(
                path, f"is damaged; load an older one with load_checkpoint(dir, tag): {'; '.join(problems)}"
            )

    def load(self, path: str, map_location: Any = None) -> Any:
        """Load a file as DeepSpeed's own engine does; one that stager has written is first compared with its hashes.

        Raises:
            CorruptCheckpointError: it is damaged.
            Exception: as of ``torch.load()``, which runs code that the file holds.
        """
        self._in_flight.wait()
        if (found := local_path(path, "path")) not in self._checked:
            self._check(found)
        return torch.load(path, map_location=map_location, weights_only=False)

    # -- the end ------------------------------------------------------------------------------------------------

    def wait(self, timeout: float | None = None) -> None:
        """Wait until every save that was begun is published, on all ranks.

        Raises:
            TimeoutError: not within ``timeout`` seconds.
            Exception: the oldest error of a save that nobody has looked at.
        """
        arguments.check_secs(timeout)
        self._in_flight.wait(timeout)
        failures = self._in_flight.take_failures()
        for number in sorted(failures):
            self._raise_or_log(failures[number])

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
            self._publisher.give_up_all()
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
    refuse_engine(engine, guard)
