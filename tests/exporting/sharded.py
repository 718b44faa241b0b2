"""A checkpoint whose tensors are in chunks, as several ranks write it, made by one process."""

from __future__ import annotations

import io
import os
import time
from pathlib import Path

import torch

from stager.torch_api.storage.spans import SEGMENT_BYTES, SpanWriter, payload_of
from stager.workers.checkpoint.documents.manifest import Manifest, ManifestHeader
from stager.workers.checkpoint.layout.items import Items
from stager.workers.checkpoint.layout.layout import FileSpec, Layout
from stager.workers.checkpoint.layout.structure import Chunks

_ROW_CUTS = {"rows": [(0, 2), (2, 7)], "empty rank": [(0, 7), (7, 7)]}


def chunked_checkpoint(directory: Path) -> tuple[str, dict[str, torch.Tensor]]:
    """The checkpoint's path, and its tensors as they are when put together: cut by rows, by columns, by both, and one whose
    chunks are stored transposed."""
    whole = {name: torch.randn(7, 6, 4) for name in ("rows", "empty rank", "columns", "both", "transposed")}
    cuts = {name: [((low, 0, 0), (high, 6, 4)) for low, high in rows] for name, rows in _ROW_CUTS.items()}
    cuts["columns"] = [((0, 0, 0), (7, 1, 4)), ((0, 1, 0), (7, 6, 4))]
    cuts["both"] = cuts["transposed"] = [
        ((0, 0, 0), (3, 6, 3)),
        ((3, 0, 0), (7, 6, 3)),
        ((0, 0, 3), (3, 6, 4)),
        ((3, 0, 3), (7, 6, 4)),
    ]
    path = directory / "step-00000001"
    path.mkdir()
    fd = os.open(path, os.O_RDONLY)
    writer = SpanWriter(fd, str(path), "__0_0.distcp")
    written, nodes = [], {}
    for name, parts in cuts.items():
        chunks = []
        for low, high in parts:
            part = whole[name][tuple(map(slice, low, high))].contiguous()
            stored = part.transpose(0, 2).contiguous().transpose(0, 2) if name == "transposed" else part
            chunks.append((low, len(written)))
            written.append(writer.append(payload_of(stored)))
        nodes[name] = Chunks((7, 6, 4), tuple(chunks)).to_node()
    buffer = io.BytesIO()
    torch.save(5, buffer)
    nodes["n"] = len(written)
    written.append(writer.append(payload_of(buffer)))
    writer.finish(fsync=False)
    writer.close()
    os.close(fd)
    files = (FileSpec("__0_0.distcp", written[-1].end),)
    structure = ["dict", list(nodes), list(nodes.values())]
    layout = Layout(files, Items.of(one.item for one in written), structure, SEGMENT_BYTES)
    header = ManifestHeader("dcp", 1, "0" * 16, time.time(), str(torch.__version__), "0")
    manifest = Manifest(header, layout, tuple(one.hashes for one in written), ())
    (path / "manifest.json").write_bytes(manifest.to_bytes())
    return str(path), whole
