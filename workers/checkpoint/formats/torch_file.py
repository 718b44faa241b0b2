"""The ``torch`` format: one ``state.pt``; ``torch.load(path, weights_only=True, mmap=True)`` reads the nested state from it.

    data/0 data/1 ...            a record for each tensor: zip header, raw bytes at a multiple of 64
    objects                      each a small torch.save archive of its own, in no record of the outer one
    data.pkl byteorder version   and the zip's directory: the trailer

torch finds records by the zip's directory, at the end, so their order does not matter. ``data.pkl`` comes last, because its
length changes with the objects in it; so tensors keep their offsets from save to save. The objects' pickles are parts of
``data.pkl`` (``torch_save.py``), and the directory points to the objects' storages inside their archives, so no tensor is
stored twice.

The checksum field of a tensor's record is 0: the header is written before the bytes are known. torch does not check it
(its zip reader is built with MINIZ_DISABLE_ZIP_READER_CRC32_CHECKS); ``unzip`` and Python's ``zipfile`` do, and complain.
stager's own hashes cover every byte. There is no ``.format_version``: with it, and ``calculate_storage_offsets`` set, torch
would compute where records are instead of looking. There is no ``.data/serialization_id``, which torch only logs.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from stager.workers.checkpoint.formats.contract import (
    Format,
    HeadersAndTails,
    Split,
    TensorLayout,
    TensorSpecs,
    Trailer,
)
from stager.workers.checkpoint.formats.pickle_template import END, HEADER
from stager.workers.checkpoint.formats.zip_records import (
    DIRECTORY,
    Record,
    directory_entry,
    directory_of,
    local_header,
    put_records,
)
from stager.workers.checkpoint.layout.items import Item, Items
from stager.workers.checkpoint.layout.layout import FileSpec, Layout, align

if TYPE_CHECKING:
    from stager.workers.checkpoint.formats.torch_save import Piece
    from stager.workers.checkpoint.layout.layout_plan import LayoutPlan

_SMALL_BLOB_BYTES = 4096

OpenedObject = tuple[bytes, tuple[Record, ...]]
"""An object's fragment of ``data.pkl``, and the records of its storages in its archive."""


class TorchFormat(Format):
    """See the head of this file."""

    one_file = True
    has_chunks = False
    has_recipes = False  # stock torch.load builds the state from data.pkl

    def object_file_name(self, rank: int) -> str:
        """Objects go to the end of the one file."""
        return "state.pt" if rank == 0 else f"state-rank{rank:05d}.pt"

    def lay_out(self, tensors: TensorSpecs, rank: int, split: Split) -> TensorLayout:
        """Put the tensors into one file, as zip records without gaps."""
        from stager.workers.checkpoint.formats.torch_save import headers_and_tails_of

        headers_and_tails_of(tensors)  # refuses what torch.save cannot write
        items: list[Item] = []
        offset = 0
        for number, spec in enumerate(tensors):
            head = len(local_header(_record(number, spec.nbytes, offset)))
            items.append(spec.item(0, offset, head))
            offset += items[-1].nbytes
        files = (FileSpec(self.object_file_name(rank), align(offset)),) if items else ()
        return TensorLayout(range(len(items)), Items.of(items), files)

    def headers_and_tails(self, layout: Layout) -> HeadersAndTails:
        """Give each tensor its zip header; no item has a tail."""

        def around(index: int) -> tuple[bytes, bytes]:
            item = layout.items[index]
            if item.kind != "tensor":
                return b"", b""
            return local_header(_record(index, item.data_nbytes, item.offset)), b""

        return around

    def trailer(self, plan: LayoutPlan) -> Trailer:
        """Make ``data.pkl`` and the zip's directory. What stays the same from save to save is made here, once per plan."""
        from stager.workers.checkpoint.formats.torch_save import data_pkl, tensor_fragment

        tensors = plan.tensors

        def leaf(index: int) -> Piece:
            if index >= len(tensors):
                return index - len(tensors)
            item = tensors[index]
            return tensor_fragment(str(index), item.dtype, item.shape, item.stride)

        pieces = data_pkl(plan.structure, leaf)
        entries = [directory_entry(_record(i, item.data_nbytes, item.offset)) for i, item in enumerate(tensors)]
        start = plan.files[0].nbytes if plan.files else 0
        joined = b"".join(entries)
        return lambda blobs: [_trailer(pieces, joined, len(tensors), start, blobs)]


def _record(number: int, nbytes: int, offset: int) -> Record:
    return Record(f"data/{number}", nbytes, offset)


def _trailer(pieces: list[Piece], entries: bytes, num_entries: int, offset: int, blobs: Sequence[bytes]) -> bytes:
    """Make the trailer of a file whose objects' ``blobs`` begin at ``offset``, after ``num_entries`` tensors."""
    from stager.workers.checkpoint.formats.object_pickle import SMALL_RECORDS

    records: list[Record] = []
    fragments: list[bytes] = []
    for blob in blobs:
        fragment, storages = (_open_small_object if len(blob) < _SMALL_BLOB_BYTES else _open_object)(blob)
        fragments.append(fragment)
        records += [Record(r.name, r.nbytes, offset + r.offset, r.crc32) for r in storages]
        offset = align(offset + len(blob))
    data = b"".join(piece if isinstance(piece, bytes) else fragments[piece] for piece in pieces)
    written, small = put_records([("data.pkl", data), *SMALL_RECORDS], offset)
    start = offset + len(written)
    return written + directory_of([*records, *small], start, entries, num_entries)


def _open_object(blob: bytes) -> OpenedObject:
    """Take an object's archive apart again: only blobs, not their parts, come from the format's ``object_blob``."""
    with zipfile.ZipFile(io.BytesIO(blob)) as opened:
        data = opened.read(f"{DIRECTORY}data.pkl")
        storages = tuple(
            Record(info.filename.removeprefix(DIRECTORY), info.file_size, info.header_offset, info.CRC)
            for info in opened.infolist()
            if info.filename.startswith(f"{DIRECTORY}data/")
        )
    return data[len(HEADER) : -len(END)], storages


# Most objects are small numbers, and the same in every save. Large blobs must not stay in memory.
_open_small_object = lru_cache(maxsize=4096)(_open_object)
