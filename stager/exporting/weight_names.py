"""The names of exported weights: those of the checkpoint, renamed or left out; of tied weights, the first one is kept.

transformers keeps the same one: it stores the weights that its models are tied to (``transformer.wte.weight`` of GPT-2,
``shared.weight`` of T5, ``model.embed_tokens.weight`` of Llama), and a module has its embeddings before its head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from stager.exporting.source import Source
from stager.loading.renaming import check_used, new_name
from stager.workers.checkpoint.layout.structure import fqn
from stager.workers.errors import StateMismatchError, UsageError

Rename = Mapping[str, str | None] | Callable[[str], str | None]
"""From the name of a weight to its new name, or to None, which leaves it out."""


@dataclass(frozen=True, slots=True)
class WeightNames:
    """The names of the tensors that are exported.

    Attributes:
        of: the names of each tensor, by its number in the source. The first is kept; the others are tied to it.
        left_out: the names that ``rename`` left out.
    """

    of: dict[int, tuple[str, ...]]
    left_out: tuple[str, ...]

    def tied(self) -> dict[str, str]:
        """Return the names that are not kept, and the one that is kept for each."""
        return {other: names[0] for names in self.of.values() for other in names[1:]}


def check_rename(rename: object) -> None:
    """Raise UsageError if ``rename`` is neither a mapping nor a function."""
    if rename is not None and not isinstance(rename, Mapping) and not callable(rename):
        raise UsageError(
            f"rename is a {type(rename).__name__}; give a mapping of old names to new ones, or a function that returns the "
            "new name, or None to leave a weight out"
        )


def name_weights(source: Source, rename: Rename | None, path: str) -> WeightNames:
    """Name the tensors that are exported.

    Args:
        path: of the checkpoint, for messages.

    Raises:
        StateMismatchError: two tensors get one name, a mapping has a name that no tensor has, or no tensor is left.
        UsageError: ``rename`` made no name of a name, or raised.
    """
    names: dict[int, tuple[str, ...]] = {}
    owners: dict[str, tuple[int, str]] = {}  # of each new name: the tensor, its old name
    left_out: list[str] = []
    for number in source.tensors:
        kept: dict[str, None] = {}
        for old in map(fqn, source.paths[number]):
            new = old if rename is None else _renamed(rename, old)
            if new is None:
                left_out.append(old)
                continue
            owner, other = owners.setdefault(new, (number, old))
            if owner != number:
                raise StateMismatchError(f"{path}: {other} and {old} get the same name, {new}; nothing was written")
            kept[new] = None
        if kept:
            names[number] = tuple(kept)
    if rename is not None:
        check_used(rename, [fqn(key_path) for number in source.tensors for key_path in source.paths[number]], path)
    if not names:
        raise StateMismatchError(f"{path}: no tensor is left to export; nothing was written. {_why(source, left_out)}")
    return WeightNames(names, tuple(left_out))


def _renamed(rename: Rename, old: str) -> str | None:
    try:
        new: object = new_name(rename, old)
    except Exception as error:
        raise UsageError(f"rename raised {type(error).__name__} for the name {old!r}: {error}") from error
    if new is not None and (not isinstance(new, str) or not new):
        raise UsageError(
            f"rename made {new!r} of {old!r}; it has to be a text that is not empty, or None to leave it out"
        )
    return new


def _why(source: Source, left_out: list[str]) -> str:
    if left_out:
        return f"rename left out all {len(left_out)} names"
    return f"keys selects {len(source.objects)} objects, and weights are tensors; stager inspect lists both"
