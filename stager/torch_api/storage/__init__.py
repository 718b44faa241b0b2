"""stager's storage writer and reader for ``dcp.save``, ``dcp.async_save`` and ``dcp.load``.

    every rank     save plan -> spans.py (bytes of each value, files, hashes) -> results
    coordinator    results -> assembly.py (layout and structure) -> target.py (.metadata, manifest, rename)
    every rank     manifest -> loading/dcp/index.py (DCP's Metadata) -> load plan -> loading/dcp/read_plan.py

A checkpoint of ``Checkpointer`` is written by workers from a slab whose layout is known before. Here values come one by one
from a planner, and the size of an object is known only when it comes. So each thread appends to a file of its own, and the
layout is assembled at the end.
"""

from stager.torch_api.storage.reader import StagerStorageReader
from stager.torch_api.storage.writer import StagerStorageWriter

__all__ = ["StagerStorageReader", "StagerStorageWriter"]
