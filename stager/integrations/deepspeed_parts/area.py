"""The names in ``SAVE_DIR/.stager``, where the files of a tag lie until all of them are there.

rank-00000/                     a directory for each rank, which its PathCheckpointer locks
    RUN-7-mp_rank_00_....pt/    a file of the seventh save of this run, as a checkpoint of its own: state.pt, manifest.json
report-00000.json               by each rank, when all its files of a save are there, or cannot be
outcome.json                    by rank 0, when that save is published, or cannot be
new-RUN-7/                      by rank 0: the tag, before it is renamed
replaced/TAG/                   by rank 0: the older checkpoint of this tag, or the new one, while it takes its place
old-TAG/                        by rank 0: what has been replaced, while it is removed

Reports and the outcome are overwritten by those of the next save: a rank reports only when it has seen the last outcome.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from stager.workers.checkpoint.documents.manifest import MANIFEST_NAME
from stager.workers.checkpoint.storage.posix import files
from stager.workers.faults import point

AREA = ".stager"
MANIFESTS = ".stager"  # in a tag
OUTCOME = "outcome.json"
_REPLACED = "replaced"
_OLD = "old-"
_RANK = re.compile(r"rank-([0-9]{5,})")
FILE_NAME = "state.pt"  # of persistence.format: torch


@dataclass(frozen=True)
class Area:
    """The directory ``.stager`` of one ``save_dir``, as one rank of one run uses it.

    Attributes:
        save_dir: absolute.
        run: tells this run's files from those that another one left.
    """

    save_dir: str
    run: str
    rank: int
    num_ranks: int

    @property
    def root(self) -> str:
        """Its path."""
        return os.path.join(self.save_dir, AREA)

    def of_rank(self, rank: int) -> str:
        """Return where a rank's files are written."""
        return os.path.join(self.root, f"rank-{rank:05d}")

    def written(self, rank: int, number: int, name: str) -> str:
        """Return the path of a rank's file of a save, which is that of a checkpoint."""
        return os.path.join(self.of_rank(rank), f"{self.run}-{number}-{name}")

    def report(self, rank: int) -> str:
        """Return the path of a rank's report."""
        return os.path.join(self.root, f"report-{rank:05d}.json")

    def outcome(self) -> str:
        """Return the path of the outcome."""
        return os.path.join(self.root, OUTCOME)

    def new(self, number: int) -> str:
        """Return where rank 0 collects the files of a tag."""
        return os.path.join(self.root, f"new-{self.run}-{number}")


def manifest_name(name: str) -> str:
    """Return the name of a file's manifest. DeepSpeed takes whatever begins like its own files for one of them."""
    return f"manifest-{name}.json"


def take_out(written: str, path: str, manifests: str | None) -> None:
    """Move a file out of the checkpoint that it was written as.

    Args:
        path: where to.
        manifests: the directory for its manifest; None: for none.
    """
    _move(os.path.join(written, FILE_NAME), path)
    if manifests is not None:
        os.rename(os.path.join(written, MANIFEST_NAME), os.path.join(manifests, manifest_name(os.path.basename(path))))
    files.remove(written)


def _move(source: str, path: str) -> None:
    """Move a file, also to another file system. It has its new name when it is whole."""
    try:
        os.replace(source, path)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        temporary = f"{path}.{os.getpid()}.tmp"
        try:
            shutil.copyfile(source, temporary)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            files.remove(temporary)
            raise


# -- a tag that is saved again ----------------------------------------------------------------------------------------
#
# The new directory goes to replaced/TAG first. There it and the old one are exchanged, in one step. So after a kill the tag
# is one of them, and replaced/TAG the other. Nobody needs to know which: the files that a user has put into the old one are
# moved, and the new one has none.
# Where the file system cannot exchange two names, replaced/TAG is the old one. After a kill the tag may lack its name, and
# gets it back.


def replace_tag(area: Area, tag: str, new: str) -> None:
    """Give a directory the name of a tag. An older checkpoint of this name goes, and what others have put into it stays."""
    final = os.path.join(area.save_dir, tag)
    aside = os.path.join(area.root, _REPLACED, tag.replace("%", "%25").replace("/", "%2F"))
    os.makedirs(os.path.dirname(final), exist_ok=True)
    _end_replacement(aside, final)  # of an attempt that failed
    if not os.path.lexists(final):
        os.rename(new, final)
        return
    os.makedirs(os.path.dirname(aside), exist_ok=True)
    try:
        _put_aside(new, final, aside)
    finally:
        _end_replacement(aside, final)


def _put_aside(new: str, final: str, aside: str) -> None:
    os.rename(new, aside)
    point("deepspeed.aside")
    if not files.exchange(aside, final):
        os.rename(aside, new)
        os.rename(final, aside)
        point("deepspeed.unnamed")
        os.rename(new, final)
    point("deepspeed.replaced")


def _end_replacement(aside: str, final: str) -> None:
    """Remove what has been replaced, without the user's files; or give it its name again if nothing has it."""
    if not os.path.lexists(aside):
        return
    if not os.path.lexists(final):
        os.rename(aside, final)
        return
    for name in () if os.path.islink(aside) else os.listdir(aside):
        if not (name.endswith(".pt") or name == MANIFESTS or os.path.lexists(os.path.join(final, name))):
            os.rename(os.path.join(aside, name), os.path.join(final, name))
    # By another name: what is half removed must not become the tag again.
    gone = os.path.join(os.path.dirname(os.path.dirname(aside)), f"{_OLD}{os.path.basename(aside)}")
    files.remove(gone)
    os.rename(aside, gone)
    files.remove(gone)


def is_half_replaced(save_dir: str) -> bool:
    """Tell whether a process was killed while it replaced a tag: then a tag may lack its name, or what users put into it."""
    directory = os.path.join(save_dir, AREA, _REPLACED)
    return os.path.isdir(directory) and bool(os.listdir(directory))


def _end_replacements(save_dir: str) -> None:
    directory = os.path.join(save_dir, AREA, _REPLACED)
    for name in os.listdir(directory) if os.path.isdir(directory) else ():
        _end_replacement(os.path.join(directory, name), os.path.join(save_dir, unquote(name)))


def remove_remains(area: Area, recover: Callable[[str], object]) -> None:
    """Remove what earlier runs have left of files that were not published. Called before the first save of each rank.

    Args:
        recover: locks a directory that a rank writes into, and waits for the workers that still do so.
    """
    _remove_files_of_rank(area, area.rank, recover)
    if area.rank != 0:
        return
    # Only now: the lock on this rank's directory tells that no other run's rank 0 publishes here.
    _end_replacements(area.save_dir)
    for name in os.listdir(area.root):
        found = _RANK.fullmatch(name)
        if found is not None and int(found[1]) >= area.num_ranks:
            _remove_files_of_rank(area, int(found[1]), recover)
        elif name.startswith(("new-", _OLD)):
            files.remove(os.path.join(area.root, name))


def _remove_files_of_rank(area: Area, rank: int, recover: Callable[[str], object]) -> None:
    directory = area.of_rank(rank)
    recover(directory)
    for name in os.listdir(directory):
        if not name.startswith("."):  # the lock
            files.remove(os.path.join(directory, name))


def write_message(path: str, message: dict[str, Any]) -> None:
    """Write a report or an outcome, which other ranks see whole or not at all."""
    directory, name = os.path.split(path)
    directory_fd = files.open_directory(directory)
    try:
        files.write_atomically(directory_fd, directory, name, json.dumps(message).encode(), fsync=False)
    finally:
        os.close(directory_fd)


def read_message(path: str, run: str, number: int) -> dict[str, Any] | None:
    """Read a report or an outcome; None if there is none of this save."""
    data = files.read_if_exists(path)
    if data is None:
        return None
    message: dict[str, Any] = json.loads(data)
    return message if (message["run"], message["number"]) == (run, number) else None
