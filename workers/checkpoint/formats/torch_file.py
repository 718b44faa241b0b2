"""The ``torch`` format: one ``state.pt``; ``torch.load(path, weights_only=True, mmap=True)`` reads the nested state from it.

    data/0 data/1 ...            a record for each tensor: zip header, raw bytes at a multiple of 64
    objects                      each a small torch.save archive of its own, in no record of the outer one
    data.pkl byteorder version   and the zip's directory: the trailer

torch finds records by the zip's directory, at the end, so their order does not matter. ``data.pkl`` comes last, because its
length changes with the objects in it; so tensors keep their offsets from save to save. The objects' pickles are parts of
``data.pkl`` (``torch_pickle.py``), and the directory points to the objects' storages inside their archives, so no tensor is
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
    HeadersAndTails,
    Split,
    TensorLayout,
    TensorSpec,
    Trailer,
    tensor_item,
)
from stager.workers.checkpoint.formats.zip_records import (
    DIRECTORY,
    Record,
    directory_end,
    directory_entry,
    local_header,
    put_records,
)
from stager.workers.checkpoint.layout.layout import FileSpec, Item, Layout, align
from stager.workers.checkpoint.layout.plan_cache import Templates
from stager.workers.errors import UnstageableError

if TYPE_CHECKING:
    from stager.workers.checkpoint.formats.object_pickle import PickledObject
    from stager.workers.checkpoint.formats.torch_pickle import Piece
    from stager.workers.checkpoint.layout.layout_plan import LayoutPlan

row_major = False
one_file = True
has_recipes = False
has_chunks = False


def holds(dtype: str) -> bool:
    """``torch.save`` writes every dtype."""
    return True


def object_file_name(rank: int) -> str:
    """Objects go to the end of the one file."""
    return "state.pt" if rank == 0 else f"state-rank{rank:05d}.pt"


def lay_out(tensors: Sequence[TensorSpec], rank: int, split: Split) -> TensorLayout:
    """Put the tensors into one file, as zip records without gaps."""
    from stager.workers.checkpoint.formats import torch_pickle

    items = []
    offset = 0
    for number, spec in enumerate(tensors):
        try:
            torch_pickle.tensor_fragment("0", spec.dtype, spec.shape, spec.stride)
        except Exception as error:
            raise UnstageableError(spec.describe(), f"torch.save cannot write {spec.dtype}: {error}") from error
        head = len(local_header(_record(number, spec.nbytes, offset)))
        items.append(tensor_item(spec, 0, offset, head, spec.nbytes, 0))
        offset = items[-1].offset + items[-1].nbytes
    files = (FileSpec(object_file_name(rank), align(offset)),) if items else ()
    return TensorLayout(range(len(items)), tuple(items), files)


def templates(tensors: Sequence[Item]) -> Templates:
    """None are needed: zip headers are made without torch."""
    return {}


def headers_and_tails(layout: Layout) -> HeadersAndTails:
    """Give each tensor its zip header; no item has a tail."""

    def around(index: int) -> tuple[bytes, bytes]:
        item = layout.items[index]
        if item.kind != "tensor":
            return b"", b""
        return local_header(_record(index, item.data_nbytes, item.offset)), b""

    return around


def _record(number: int, nbytes: int, offset: int) -> Record:
    return Record(f"data/{number}", nbytes, offset)


def object_blob(value: object, leaf: int) -> PickledObject:
    """Pickle an object. The directory of the whole file will name its storages, too."""
    from stager.workers.checkpoint.formats.object_pickle import pickle_object

    return pickle_object(value, leaf)


def index_files(layout: Layout, save_id: str, directory: str) -> dict[str, bytes]:
    """None are needed: the zip has its own directory."""
    return {}


def trailer(plan: LayoutPlan) -> Trailer:
    """Make ``data.pkl`` and the zip's directory. What stays the same from save to save is made here, once per plan."""
    from stager.workers.checkpoint.formats import torch_pickle

    tensors = plan.tensors
    count = len(tensors)

    def leaf(index: int) -> Piece:
        if index >= count:
            return index - count
        item = tensors[index]
        return torch_pickle.tensor_fragment(str(index), item.dtype, item.shape, item.stride)

    pieces = torch_pickle.pieces(plan.structure, leaf)
    entries = b"".join(directory_entry(_record(i, item.data_nbytes, item.offset)) for i, item in enumerate(tensors))
    start = plan.files[0].nbytes if plan.files else 0

    return lambda blobs: [_trailer(pieces, entries, count, start, blobs)]


def _trailer(pieces: list[Piece], tensor_entries: bytes, count: int, offset: int, blobs: Sequence[bytes]) -> bytes:
    from stager.workers.checkpoint.formats.object_pickle import SMALL_RECORDS

    records: list[Record] = []
    fragments: list[bytes] = []
    for blob in blobs:
        fragment, storages = _open_object(blob)
        fragments.append(fragment)
        records += [Record(r.name, r.nbytes, offset + r.offset, r.crc32) for r in storages]
        offset = align(offset + len(blob))
    data = b"".join(piece if isinstance(piece, bytes) else fragments[piece] for piece in pieces)
    written, small = put_records([("data.pkl", data), *SMALL_RECORDS], offset)
    records += small
    entries = b"".join((tensor_entries, *map(directory_entry, records)))
    start = offset + sum(map(len, written))
    return b"".join((*written, entries, directory_end(count + len(records), len(entries), start)))


@lru_cache(maxsize=4096)  # most objects are small numbers, and the same in every save
def _open_small(blob: bytes) -> tuple[bytes, tuple[Record, ...]]:
    from stager.workers.checkpoint.formats import torch_pickle

    with zipfile.ZipFile(io.BytesIO(blob)) as opened:
        data = opened.read(f"{DIRECTORY}data.pkl")
        storages = tuple(
            Record(info.filename.removeprefix(DIRECTORY), info.file_size, info.header_offset, info.CRC)
            for info in opened.infolist()
            if info.filename.startswith(f"{DIRECTORY}data/")
        )
    return data[len(torch_pickle.START) : -len(torch_pickle.END)], storages


def _open_object(blob: bytes) -> tuple[bytes, tuple[Record, ...]]:
    """Return an object's fragment of ``data.pkl``, and the records of its storages in the archive."""
    return _open_small(blob) if len(blob) < 4096 else _open_small.__wrapped__(blob)
