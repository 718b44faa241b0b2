"""The ``dcp`` format: a stock ``torch.distributed.checkpoint`` directory.

Each item is what ``torch.save`` writes for it (``torch_save.py``): a zip archive whose one large record is the raw storage.
Stock ``FileSystemReader`` finds the item in ``.metadata``, a pickled ``Metadata`` (``dcp_index.py``), and reads it with
``torch.load``.
"""

from __future__ import annotations

from collections.abc import Iterable

from stager.workers.checkpoint.formats.contract import (
    Format,
    HeadersAndTails,
    Split,
    TensorLayout,
    TensorSpecs,
    nbytes_of,
)
from stager.workers.checkpoint.formats.dcp_index import dcp_index, index_templates, tensor_name
from stager.workers.checkpoint.layout.items import NOT_IN_A_SLAB, ItemKind, Items, column
from stager.workers.checkpoint.layout.layout import BLOB_ALIGN_BYTES, FileSpec, Layout, Templates

METADATA_NAME = ".metadata"


class DcpFormat(Format):
    """See the head of this file."""

    def object_file_name(self, rank: int) -> str:
        """Objects have a file of their own, so that the offsets of tensors never change."""
        return f"__{rank}_objects.distcp"

    def lay_out(self, tensors: TensorSpecs, rank: int, split: Split) -> TensorLayout:
        """Make each tensor an archive of its own. Archives follow each other at multiples of 64 bytes."""
        import numpy as np  # late: the workers start without it

        from stager.workers.checkpoint.formats.torch_save import headers_and_tails_of

        around = headers_and_tails_of(tensors)
        data = tensors.of_each(nbytes_of)
        heads, tails = (np.array([len(pair[end]) for pair in around] or [0], np.int64)[tensors.codes] for end in (0, 1))
        nbytes = heads + data + tails
        sizes = -(-nbytes // BLOB_ALIGN_BYTES) * BLOB_ALIGN_BYTES
        runs = split(tensors, sizes)
        order = np.concatenate([np.zeros(0, np.int64), *(np.asarray(run, dtype=np.int64) for run in runs)])
        lengths = [len(run) for run in runs]
        sizes = sizes[order]
        ends = np.cumsum(sizes)
        last = np.cumsum(lengths, dtype=np.int64) - 1
        starts = np.concatenate([[0], ends[last][:-1]])[: len(lengths)]  # of the files, if they followed each other
        offset = ends - sizes - np.repeat(starts, lengths)
        items = Items(
            kinds=tuple(tensors.kinds),
            kind=column(tensors.codes[order]),
            file=column(np.repeat(np.arange(len(runs)), lengths)),
            offset=column(offset),
            nbytes=column(nbytes[order]),
            data_offset=column(offset + heads[order]),
            data_nbytes=column(data[order]),
            slab_offset=column(np.full(len(order), NOT_IN_A_SLAB)),
        )
        files = [FileSpec(f"__{rank}_{file}.distcp", end) for file, end in enumerate((ends[last] - starts).tolist())]
        return TensorLayout(order.tolist(), items, tuple(files))

    def templates(self, kinds: Iterable[ItemKind]) -> Templates:
        """Make header and tail for each (dtype, shape, stride), and the pieces of ``.metadata``."""
        from stager.workers.checkpoint.formats.torch_save import header_and_tail

        kinds = list(kinds)
        around = {_around_name(kind): header_and_tail(kind.dtype, kind.shape, kind.stride) for kind in kinds}
        return {**around, **index_templates(kinds)}

    def headers_and_tails(self, layout: Layout) -> HeadersAndTails:
        """Take header and tail from the templates."""
        made = self._templates(layout)

        def around(kind: ItemKind) -> tuple[bytes, bytes]:
            if kind.kind != "tensor":
                return b"", b""
            head, tail = made[_around_name(kind)]
            return head, tail

        items = layout.items
        of_kinds = list(map(around, items.kinds))
        return lambda index: of_kinds[items.kind[index]]

    def index_files(self, layout: Layout, save_id: str, directory: str) -> dict[str, bytes]:
        """Make ``.metadata`` as ``dcp.save`` writes it."""
        return {METADATA_NAME: dcp_index(layout, self._index_templates(layout), save_id, directory)}

    def _templates(self, layout: Layout) -> Templates:
        """Return the templates that came with the plan; make them, with torch, for a layout from elsewhere."""
        if layout.cache.templates is not None:
            return layout.cache.templates
        return layout.cache.once_per_plan("templates", lambda: self.templates(layout.items.tensor_kinds()))

    def _index_templates(self, layout: Layout) -> Templates:
        """Return the templates that ``.metadata`` is made of (``dcp_index.py``), for the tensors of all ranks.

        Mostly the plan of this rank has them. New ones are made if other ranks have dtypes or dimensions that it lacks.
        """
        made, cache = self._templates(layout), layout.cache
        has_all = cache.once_per_plan(
            "has index templates", lambda: {tensor_name(kind) for kind in layout.items.tensor_kinds()} <= made.keys()
        )
        if has_all:
            return made
        return cache.once_per_plan("index templates", lambda: self.templates(layout.items.tensor_kinds()))


def _around_name(kind: ItemKind) -> str:
    # Replicas of version 0.1 hold templates of this name: it stays "frame".
    return f"frame {kind.dtype} {kind.shape} {kind.stride}"
