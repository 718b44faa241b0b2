"""Damages a committed checkpoint on purpose."""

from __future__ import annotations

import os
from dataclasses import dataclass

from stager.stress.fault_kinds import Damage
from stager.workers.checkpoint.directory.run_directory import committed_steps, read_checkpoint
from stager.workers.errors import StagerError


@dataclass(frozen=True, slots=True)
class Damaged:
    """A damaged checkpoint: its step, the damaged file, and the save_id ("" if the manifest is gone)."""

    step: int
    file: str
    save_id: str
    newest: bool


def inflict_damage(directory: str, damage: Damage, spare: frozenset[int] = frozenset()) -> Damaged | None:
    """Damage one checkpoint, if there is another one to fall back to; otherwise return None.

    Args:
        spare: steps that are damaged already.
    """
    steps = [step for step in committed_steps(directory) if step not in spare]
    if len(steps) < 2:
        return None
    step = steps[0] if damage.newest else steps[int(damage.place * len(steps))]
    path = os.path.join(directory, f"step-{step:08d}")
    save_id = read_checkpoint(directory, step)[0].save_id
    names = sorted(name for name in os.listdir(path) if os.path.getsize(os.path.join(path, name)))
    name = names[int(damage.file * len(names))]
    _spoil(os.path.join(path, name), damage)
    try:
        read_checkpoint(directory, step)
    except StagerError:
        if not os.path.exists(os.path.join(path, "manifest.json")):
            save_id = ""
    return Damaged(step, name, save_id, step == steps[0])


def _spoil(path: str, damage: Damage) -> None:
    size = os.path.getsize(path)
    place = min(size - 1, int(damage.place * size))
    if damage.how == "remove":
        os.unlink(path)
    elif damage.how == "truncate":
        os.truncate(path, place)
    else:
        with open(path, "r+b") as file:
            file.seek(place)
            byte = file.read(1)
            file.seek(place if damage.how == "flip" else size)
            file.write(bytes([byte[0] ^ 0x10]))
