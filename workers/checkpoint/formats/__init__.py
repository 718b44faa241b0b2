"""On-disk formats, by name. A new format is a subclass of :class:`Format`, added to ``FORMATS``.

Reading order: ``contract.py``; ``torch_save.py`` (what torch writes); ``dcp.py``, ``pickle_template.py``, ``dcp_index.py``;
``zip_records.py``, ``torch_file.py``; ``safetensors_format.py``.
"""

from __future__ import annotations

from stager.workers.checkpoint.formats.contract import Format
from stager.workers.checkpoint.formats.dcp import DcpFormat
from stager.workers.checkpoint.formats.safetensors_format import SafetensorsFormat
from stager.workers.checkpoint.formats.torch_file import TorchFormat

__all__ = ["FORMATS", "Format", "get_format"]

FORMATS: dict[str, Format] = {"dcp": DcpFormat(), "torch": TorchFormat(), "safetensors": SafetensorsFormat()}

get_format = FORMATS.__getitem__
