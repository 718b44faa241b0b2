"""Which tensors of an incremental save share a file: those that are likely to change together.

A file can be linked to the last checkpoint's only when none of its bytes changed, so what is frozen and what is trained
had better not share one; and there should be few hundred files at most. What is known of a tensor before anything has
changed is its name. Tensors whose names differ in numbers only (one weight in every layer, one moment of every parameter)
have the same *role*, and mostly the same fate.

    large roles    each has files of its own, cut between tensors into stretches of about 1/128 of the whole
    small roles    below 64 KiB together, or beyond the 128 largest: share files of the same size, in order
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from stager.workers.checkpoint.formats.contract import TensorSpecs

_MAX_ROLES = 128
_SMALLEST_ROLE_BYTES = 64 << 10
_SMALLEST_FILE_BYTES = 4 << 20
_NUM_STRETCHES = 128

_NUMBER = re.compile(r"\d+")


def role(name: str) -> str:
    """Return a leaf's name without its numbers: ``model.layers.#.mlp.weight``."""
    return _NUMBER.sub("#", name)


def by_role(tensors: TensorSpecs, sizes: Sequence[int]) -> list[list[int]]:
    """Split by role, as a :data:`stager.workers.checkpoint.formats.contract.Split`."""
    return group([role(spec.names[0]) for spec in tensors], list(map(int, sizes)))


def group(roles: Sequence[str], sizes: Sequence[int]) -> list[list[int]]:
    """Divide tensors into files, about 400 at most: the positions of the tensors of each file.

    Args:
        roles: of each tensor.
        sizes: of each tensor in its file, bytes.
    """
    members: dict[str, list[int]] = {}
    for position, name in enumerate(roles):
        members.setdefault(name, []).append(position)
    totals = {name: sum(sizes[position] for position in positions) for name, positions in members.items()}
    large = {name for name in members if totals[name] >= _SMALLEST_ROLE_BYTES}
    if len(large) > _MAX_ROLES:
        large = set(sorted(large, key=totals.__getitem__, reverse=True)[:_MAX_ROLES])
    target = max(_SMALLEST_FILE_BYTES, sum(totals.values()) // _NUM_STRETCHES)
    files: list[list[int]] = []
    for name, positions in members.items():
        if name in large:
            files += _cut(positions, sizes, target)
    return files + _cut(
        (p for name, positions in members.items() if name not in large for p in positions), sizes, target
    )


def _cut(positions: Iterable[int], sizes: Sequence[int], target: int) -> list[list[int]]:
    """Cut into stretches of at most ``target`` bytes; a larger tensor is a stretch of its own."""
    files: list[list[int]] = []
    nbytes = 0
    for position in positions:
        if not files or nbytes + sizes[position] > target:
            files.append([])
            nbytes = 0
        files[-1].append(position)
        nbytes += sizes[position]
    return files
