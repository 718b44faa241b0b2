"""What the trainer makes with torch so that workers, which start without it, can write: pieces of bytes, by name.

Made once for a plan, they lie beside it in the slab. They are not in the record of a save: a crash may be followed by
another version of stager or torch, and what is read from a disk should not get into the pickle that ``.metadata`` is.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping

Templates = Mapping[str, tuple[bytes, ...]]
"""What each is for is the format's to say (``formats/dcp.py``)."""


def to_bytes(templates: Templates) -> bytes:
    """``{name: [length of each piece, ...]}`` as a line of JSON, and all pieces."""
    nbytes = {name: list(map(len, pieces)) for name, pieces in templates.items()}
    return b"\n".join((json.dumps(nbytes).encode(), b"".join(itertools.chain.from_iterable(templates.values()))))


def from_bytes(data: bytes) -> Templates:
    """What :func:`to_bytes` was given."""
    head, _, body = data.partition(b"\n")
    templates: dict[str, tuple[bytes, ...]] = {}
    position = 0
    for name, nbytes in json.loads(head).items():
        ends = list(itertools.accumulate(nbytes, initial=position))
        templates[name] = tuple(body[start:end] for start, end in itertools.pairwise(ends))
        position = ends[-1]
    return templates
