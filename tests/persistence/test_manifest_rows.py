"""A manifest put together from texts that were kept is what ``json.dumps`` of it gives."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from stager.workers.checkpoint.documents.manifest import IndexFile, Manifest, ManifestHeader, parse_manifest
from stager.workers.checkpoint.layout.items import ROW_COLUMNS
from stager.workers.checkpoint.layout.layout import Layout, num_segments
from stager.workers.checkpoint.write.write_task import read_layout
from tests.persistence.tasks import make_task
from tests.states import everything

HEADER = ManifestHeader("dcp", 7, "0a", 1.5, "2.6", 'odd "version" ä')


def manifest_of(layout: Layout, value: str) -> Manifest:
    counts = [num_segments(end - item.offset, layout.segment_bytes) for _, item, end in layout.spans()]
    hashes = tuple((value,) * count for count in counts)
    return Manifest(HEADER, layout, hashes, (IndexFile(".metadata", 3, "0b"),))


def plain(manifest: Manifest) -> object:
    layout = manifest.layout
    rows = [[*item.to_row(), hashes] for item, hashes in zip(layout.items, manifest.hashes, strict=True)]
    return json.loads(json.dumps({"rows": rows, "structure": layout.structure, "columns": [*ROW_COLUMNS, "xxh3_128"]}))


@pytest.mark.parametrize("value", ["0" * 32, 'no "hash", [but] text', "ä", ""])
@pytest.mark.parametrize("segment_bytes", [256, 64 << 20])
def test_rows_are_what_json_gives(run_dir: Path, value: str, segment_bytes: int) -> None:
    layout = read_layout(make_task(run_dir, everything(), segment_bytes=segment_bytes))
    for manifest in (manifest_of(layout, value), manifest_of(layout, value + "1")):  # the second from what was kept
        data = manifest.to_bytes()
        body = json.loads(data)["body"]
        expected = plain(manifest)
        assert {key: body[key] for key in expected} == expected
        assert body["stager"] == HEADER.stager
        assert parse_manifest(data, "x") == replace(manifest, layout=parse_manifest(data, "x").layout)


def test_objects_of_other_sizes_are_in_the_next_manifest(run_dir: Path) -> None:
    state = everything()
    first = read_layout(make_task(run_dir, {**state, "text": "short"}))
    second = read_layout(make_task(run_dir, {**state, "text": "long " * 5000}))
    assert second.cache is first.cache and second.items != first.items
    for layout in (first, second, first):
        manifest = manifest_of(layout, "0" * 32)
        assert json.loads(manifest.to_bytes())["body"]["rows"] == plain(manifest)["rows"]
