"""stager's reader and writer for ``torch.distributed.checkpoint``: plain ``dcp.save``, ``dcp.async_save`` and ``dcp.load``.

every rank      plan -> payload.py (bytes of each value) -> spans.py (files, hashes) -> results
coordinator     results -> assembly.py (layout, structure) -> target.py (.metadata, manifest, rename)
reading         manifest -> index.py (DCP's Metadata) -> plan -> reader.py (into place), stock.py (others' checkpoints)
"""

from stager.torch_api.storage.reader import StagerStorageReader
from stager.torch_api.storage.writer import StagerStorageWriter

__all__ = ["StagerStorageReader", "StagerStorageWriter"]
