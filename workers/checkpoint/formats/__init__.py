"""On-disk formats. A new one is a module with what :class:`Format` asks for, named in ``FORMATS``."""

from __future__ import annotations

from stager.workers.checkpoint.formats import dcp, safetensors_file, torch_file
from stager.workers.checkpoint.formats.contract import Format
from stager.workers.errors import InternalError

__all__ = ["FORMATS", "Format", "get_format"]

FORMATS: dict[str, Format] = {"dcp": dcp, "torch": torch_file, "safetensors": safetensors_file}


def get_format(name: str) -> Format:
    try:
        return FORMATS[name]
    except KeyError:
        raise InternalError(f"unknown checkpoint format {name!r}; known: {', '.join(FORMATS)}") from None
