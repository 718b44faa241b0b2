"""The head of a manifest: what its first bytes say, so that a listing need not read the rest."""

from __future__ import annotations

import json
import re
from typing import NamedTuple

HEAD_BYTES = 4096


class Head(NamedTuple):
    """What the first bytes of a manifest say, unchecked; for the fields see :class:`ManifestHeader`."""

    name: str
    run: str
    number: int
    step: int
    save_id: str
    created: float


# As ``Manifest.to_bytes`` writes it, behind the seal.
_HEAD = re.compile(
    rb'[^{]*{[^{]*{"format":"stager","version":\d+,(?:"name":("(?:[^"\\]|\\.)*"),)?'
    rb'(?:"order":\["(\w*)",(\d{1,19})\],)?"kind":"\w+","step":(\d{1,19}),"save_id":"(\w*)","created":([0-9.e+-]+),'
)


def parse_head(data: bytes | None) -> Head | None:
    """Return what the first bytes of a manifest say; None: they are no manifest's."""
    match = None if data is None else _HEAD.match(data)
    if match is None:
        return None
    name, run, number, step, save_id, created = match.groups()
    try:
        text = "" if name is None else json.loads(name)
        return Head(text, (run or b"").decode(), int(number or 0), int(step), save_id.decode(), float(created))
    except ValueError:
        return None
