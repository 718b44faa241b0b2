"""The format of an exported file: given, or told by the ending of the file's name."""

from __future__ import annotations

import os

from stager.workers.errors import UsageError

_ENDINGS = {"torch": (".pt", ".pth", ".bin", ".ckpt"), "safetensors": (".safetensors",)}
FORMATS = tuple(_ENDINGS)


def format_of(out: str, file_format: str | None) -> str:
    """Return "torch" or "safetensors".

    Args:
        out: the file.
        file_format: what the caller asks for; None: nothing, so the ending of ``out`` decides.

    Raises:
        UsageError: the format is unknown, the ending tells none, or the two contradict each other.
    """
    if file_format is not None and file_format not in FORMATS:
        raise UsageError(f"unknown format {file_format!r}; known: {', '.join(FORMATS)}")
    ending = os.path.splitext(out)[1].lower()
    told = next((name for name, endings in _ENDINGS.items() if ending in endings), None)
    if file_format is None and told is None:
        what = f"the ending {ending}" if ending else "a name without an ending"
        raise UsageError(
            f"{out}: {what} does not tell the format; name the file .pt or .safetensors, or give file_format (--format): "
            f"{' or '.join(FORMATS)}"
        )
    if file_format is not None and told not in (None, file_format):
        raise UsageError(
            f"{out}: the ending {ending} is that of the format {told}, and file_format (--format) is {file_format}; "
            "change one of them, or leave file_format out"
        )
    return file_format or told or ""
