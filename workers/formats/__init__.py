"""On-disk formats. A new one is a module with the functions of :class:`Format`, named in ``FORMATS``."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from workers.errors import InternalError
from workers.formats import dcp
from workers.layout import Layout


@runtime_checkable
class Format(Protocol):
    """What a format has to say; everything else (ranges, hashes, commit) is the same for all."""

    def tensor_frame(self, dtype: str, shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[bytes, bytes]:
        """The bytes before and after a tensor's raw bytes. Depends on nothing else, so it can be cached."""

    def object_blob(self, value: object) -> bytes:
        """A pickled object."""

    def tensor_file_name(self, rank: int, index: int) -> str: ...

    def object_file_name(self, rank: int) -> str: ...

    def index_files(self, layout: Layout, save_id: str, directory: str) -> dict[str, bytes]:
        """Small files written at commit, by name: what readers of this format start from."""


FORMATS: dict[str, Format] = {"dcp": dcp}


def get_format(name: str) -> Format:
    try:
        return FORMATS[name]
    except KeyError:
        raise InternalError(f"unknown checkpoint format {name!r}; known: {', '.join(FORMATS)}") from None
