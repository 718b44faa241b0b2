"""Which part of a checkpoint is exported, and under which names: ``keys`` and ``strip_prefix``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stager.loading.match_torch import listed
from stager.loading.nodes import children_of, is_plain_mapping
from stager.loading.renaming import Renaming
from stager.loading.selection import Selection
from stager.workers.checkpoint.layout.structure import Node
from stager.workers.errors import StateMismatchError


@dataclass(frozen=True, slots=True)
class Part:
    """The part of a checkpoint that is exported.

    Attributes:
        selections: what is selected, one after the other; empty for all of the checkpoint.
        strip_prefix: what names lose. ``model.`` leaves the content of ``model``; ``model.module.`` also takes
            ``module.`` from its keys.
    """

    selections: tuple[Selection, ...] = ()
    strip_prefix: str = ""

    @staticmethod
    def of_arguments(keys: str | Sequence[str] | None, strip_prefix: str | None) -> Part:
        """Take the arguments of ``export_checkpoint()``.

        Raises:
            ArgumentError, UsageError: one of them is of another type.
        """
        selections = () if keys is None else (Selection(keys),)
        return Part(selections, Renaming.of_arguments(None, strip_prefix).strip_prefix)

    def of(self, structure: Node, path: str) -> Node:
        """Return the structure of the part.

        Args:
            path: of the checkpoint, for messages.

        Raises:
            StateMismatchError: nothing matches one of the patterns, or nothing has the prefix.
        """
        for selection in self.selections:
            structure = selection.of(structure, path)
        node, rest = _inside(structure, self.strip_prefix)
        if not rest:
            return node
        renamed = Renaming(strip_prefix=rest).of(node, path)
        if renamed == node:
            raise StateMismatchError(
                f"{path}: no name of what is exported begins with strip_prefix={self.strip_prefix!r}; nothing was written; "
                + _advice(self.strip_prefix, structure)
            )
        return renamed


def _advice(prefix: str, structure: Node) -> str:
    """Say which prefix names have.

    Args:
        structure: what is exported.
    """
    head = prefix.partition(".")[0]
    if not is_plain_mapping(children_of(structure).get(head)):
        return f"the names at its top are {listed(children_of(structure))}; stager inspect lists all names"
    if len(structure[1]) > 1:
        return (
            f"the names at its top are {listed(structure[1])}; to export what is in {head} alone, pass "
            f"keys={head!r}, strip_prefix={f'{head}.'!r}"
        )
    return f"the names in {head} begin with {f'{head}.'!r}; pass strip_prefix={f'{head}.'!r}"


def _inside(node: Node, prefix: str) -> tuple[Node, str]:
    """Go into mappings that have one key each, as far as the prefix names them.

    Returns:
        Where that led, and what is left of the prefix.
    """
    while is_plain_mapping(node) and len(node[1]) == 1 and prefix.startswith(head := f"{node[1][0]}."):
        if not is_plain_mapping(node[2][0]):
            break
        node, prefix = node[2][0], prefix[len(head) :]
    return node, prefix
