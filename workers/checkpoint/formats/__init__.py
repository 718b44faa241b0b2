"""On-disk formats, by name. A new format is a module that provides what :class:`Format` lists, added to ``FORMATS``."""

from __future__ import annotations

from stager.workers.checkpoint.formats import dcp, safetensors_format, torch_file
from stager.workers.checkpoint.formats.contract import Format
from stager.workers.errors import InternalError

__all__ = ["FORMATS", "Format", "get_format"]

FORMATS: dict[str, Format] = {"dcp": dcp, "torch": torch_file, "safetensors": safetensors_format}


def get_format(name: str) -> Format:
    """Return the format ``name``.

    Raises:
        InternalError: no format has this name.
    """
    try:
        return FORMATS[name]
    except KeyError:
        raise InternalError(f"unknown checkpoint format {name!r}; known: {', '.join(FORMATS)}") from None
