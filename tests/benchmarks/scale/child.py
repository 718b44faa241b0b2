"""A process of its own that measures what a commit of many ranks takes: CPU time, bytes, memory.

``commit`` does what ``_write_manifest`` does, with the same functions, on the records of ``shares.py``;
``parse`` what a rank that loads it does first; ``stock`` what ``dcp.async_save`` does on its coordinator.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import xxhash

from stager.workers.checkpoint.commit.commit import build_manifest, partial_path, read_contributions
from stager.workers.checkpoint.commit.merge import merge
from stager.workers.checkpoint.directory.manifest_file import read_manifest
from stager.workers.checkpoint.directory.run_directory import CheckpointInfo, partial_names
from stager.workers.checkpoint.documents.manifest import MANIFEST_NAME, IndexFile
from stager.workers.checkpoint.formats import get_format
from stager.workers.checkpoint.storage.places import storage_of
from stager.workers.gc_pause import no_collection
from tests.benchmarks.scale.measured import Commit, Parse, Stock
from tests.benchmarks.scale.size import Size
from tests.benchmarks.scale.stages import Stages


def measure_commit(directory: str, size: Size) -> Commit:
    from tests.benchmarks.scale.shares import write_shares

    spec, layout = write_shares(directory, size)
    partial, names = partial_path(spec), os.listdir(partial_path(spec))
    record_bytes, receipt_bytes = (
        sum(os.path.getsize(os.path.join(partial, name)) for name in names if name.startswith(prefix))
        for prefix in ("save-", "receipt-")
    )
    with no_collection(), storage_of(partial).open(partial) as entry:
        stages = Stages()
        shares = read_contributions(spec, layout, entry)
        assert shares is not None
        read_secs = stages.lap()
        whole, hashes = merge(shares, partial)
        merge_secs = stages.lap()
        index_files = get_format("dcp").index_files(whole, spec.save_id, directory)
        index = [IndexFile(name, len(data), xxhash.xxh3_128_hexdigest(data)) for name, data in index_files.items()]
        index_secs = stages.lap()
        text = build_manifest(shares, whole, hashes, tuple(index)).to_bytes()
        manifest_secs = stages.lap()
        peak_bytes = stages.peak_bytes()
    Path(partial, MANIFEST_NAME).write_bytes(text)
    return Commit(
        record_bytes=record_bytes,
        receipt_bytes=receipt_bytes,
        metadata_bytes=index[0].nbytes,
        manifest_bytes=len(text),
        read_secs=read_secs,
        merge_secs=merge_secs,
        index_secs=index_secs,
        manifest_secs=manifest_secs,
        peak_bytes=peak_bytes,
    )


def measure_parse(directory: str, _: Size) -> Parse:
    path = os.path.join(directory, partial_names(directory)[0])
    stages = Stages()
    CheckpointInfo.of(path, read_manifest(path))
    secs, peak_bytes = stages.lap(), stages.peak_bytes()
    text = Path(path, MANIFEST_NAME).read_text()
    with no_collection():
        stages.lap()
        json.loads(text)
    return Parse(secs=secs, json_secs=stages.lap(), peak_bytes=peak_bytes)


def main() -> None:
    what, directory, text = sys.argv[1:]
    size = Size(**json.loads(text))
    if what == "commit":
        found: Commit | Parse | Stock = measure_commit(directory, size)
    elif what == "parse":
        found = measure_parse(directory, size)
    else:
        from tests.benchmarks.scale.stock_child import measure_stock

        found = measure_stock(directory, size)
    print(json.dumps(asdict(found)))


if __name__ == "__main__":
    main()
