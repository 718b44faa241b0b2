"""The rows of a manifest as JSON text, without a list per row: what ``json.dumps`` of the rows would give.

The text of a tensor's row is the same from save to save but for its hashes, and is kept with the plan.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from stager.workers.checkpoint.layout.layout import Item, Layout
from stager.workers.gc_pause import no_collection


def rows_json(layout: Layout, hashes: Sequence[Sequence[str]]) -> str:
    """
    Args:
        hashes: of each item's segments.
    """
    fixed = layout.cache.once_per_plan("rows", lambda: _texts(layout.items[: layout.cache.num_fixed]))
    texts = [*fixed, *_texts(layout.items[layout.cache.num_fixed :])]
    if all(map(str.isalnum, map("".join, hashes))) and "".join(map("".join, hashes)).isascii():
        lists = ['["' + '","'.join(values) + '"]' for values in hashes]
    else:  # no hashes, but that is for whoever reads them to find out
        lists = [json.dumps(values, separators=(",", ":")) for values in hashes]
    return "[" + ",".join([f"[{text},{values}]" for text, values in zip(texts, lists, strict=True)]) + "]"


def structure_json(layout: Layout) -> str:
    return layout.cache.once_per_plan(
        "structure", lambda: json.dumps(layout.structure, separators=(",", ":"), allow_nan=False)
    )


def _texts(items: Sequence[Item]) -> list[str]:
    """Each row, without brackets and hashes."""
    with no_collection():
        kinds: dict[object, str] = {}  # most have one of a few shapes
        texts = []
        for item in items:
            key = item.dtype, item.shape, item.stride
            tail = kinds.get(key)
            if tail is None:
                tail = kinds[key] = json.dumps(key, separators=(",", ":"))[1:-1]
            texts.append(
                f'"{item.kind}",{item.file},{item.offset},{item.nbytes},{item.data_offset},{item.data_nbytes},{tail}'
            )
        return texts
