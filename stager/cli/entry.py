"""One line of ``stager inspect``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stager.workers.checkpoint.documents.manifest import Manifest


@dataclass(frozen=True)
class LeafEntry:
    """One leaf of the state.

    Attributes:
        key: the keys on its path, joined by dots: the name that DCP gives it.
        kind: "tensor" or "object".
        dtype, shape: of a tensor; "" and () for an object.
        nbytes: size of its values (tensor) or its pickle (object); None if it is not known.
        file: name of the file that holds it.
        offset: of its bytes in that file; None if it is not known.
        same_as: the key that it shares its bytes with (tied), or None.
    """

    key: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int | None
    file: str
    offset: int | None = None
    same_as: str | None = None


def entries_of(manifest: Manifest) -> Iterator[LeafEntry]:
    """Yield an entry for every leaf of the state, in order."""
    from stager.workers.checkpoint.layout.structure import fqn

    first_keys: dict[int, str] = {}
    for path, index in manifest.paths():
        item, key = manifest.layout.items[index], fqn(path)
        first = first_keys.setdefault(index, key)
        yield LeafEntry(
            key=key,
            kind=item.kind,
            dtype=item.dtype,
            shape=item.shape,
            nbytes=item.data_nbytes,
            file=manifest.layout.files[item.file].name,
            offset=item.data_offset,
            same_as=None if first == key else first,
        )
