"""The ``dcp`` format: a stock ``torch.distributed.checkpoint`` directory.

Each item is what ``torch.save`` writes for it (``torch_save.py``): a zip archive whose one large record is the raw storage.
Stock ``FileSystemReader`` finds the item in ``.metadata``, a pickled ``Metadata`` (``dcp_index.py``), and reads it with
``torch.load``.
"""

from __future__ import annotations

from collections.abc import Sequence

from stager.workers.checkpoint.formats.contract import Format, HeadersAndTails, Split, TensorLayout, TensorSpec
from stager.workers.checkpoint.formats.dcp_index import dcp_index, index_templates, tensor_name
from stager.workers.checkpoint.layout.layout import FileSpec, Item, Layout, Templates, align

METADATA_NAME = ".metadata"


class DcpFormat(Format):
    """See the head of this file."""

    def object_file_name(self, rank: int) -> str:
        """Objects have a file of their own, so that the offsets of tensors never change."""
        return f"__{rank}_objects.distcp"

    def lay_out(self, tensors: Sequence[TensorSpec], rank: int, split: Split) -> TensorLayout:
        """Make each tensor an archive of its own. Archives follow each other at multiples of 64 bytes."""
        from stager.workers.checkpoint.formats.torch_save import headers_and_tails_of

        around = [(len(head), len(tail)) for head, tail in headers_and_tails_of(tensors)]
        sizes = [align(head + spec.nbytes + tail) for spec, (head, tail) in zip(tensors, around, strict=True)]
        items: list[Item] = []
        files: list[FileSpec] = []
        runs = split(tensors, sizes)
        for file, run in enumerate(runs):
            offset = 0
            for number in run:
                items.append(tensors[number].item(file, offset, *around[number]))
                offset += sizes[number]
            files.append(FileSpec(f"__{rank}_{file}.distcp", offset))
        return TensorLayout([number for run in runs for number in run], tuple(items), tuple(files))

    def templates(self, tensors: Sequence[Item]) -> Templates:
        """Make header and tail for each (dtype, shape, stride), and the pieces of ``.metadata``."""
        from stager.workers.checkpoint.formats.torch_save import header_and_tail

        around = {_around_name(item): header_and_tail(item.dtype, item.shape, item.stride) for item in tensors}
        return {**around, **index_templates(tensors)}

    def headers_and_tails(self, layout: Layout) -> HeadersAndTails:
        """Take header and tail from the templates."""
        made = self._templates(layout)

        def around(index: int) -> tuple[bytes, bytes]:
            item = layout.items[index]
            if item.kind != "tensor":
                return b"", b""
            head, tail = made[_around_name(item)]
            return head, tail

        return around

    def index_files(self, layout: Layout, save_id: str, directory: str) -> dict[str, bytes]:
        """Make ``.metadata`` as ``dcp.save`` writes it."""
        return {METADATA_NAME: dcp_index(layout, self._index_templates(layout), save_id, directory)}

    def _templates(self, layout: Layout) -> Templates:
        """Return the templates that came with the plan; make them, with torch, for a layout from elsewhere."""
        if layout.cache.templates is not None:
            return layout.cache.templates
        tensors = [item for item in layout.items if item.kind == "tensor"]
        return layout.cache.once_per_plan("templates", lambda: self.templates(tensors))

    def _index_templates(self, layout: Layout) -> Templates:
        """Return the templates that ``.metadata`` is made of (``dcp_index.py``), for the tensors of all ranks.

        Mostly the plan of this rank has them. New ones are made if other ranks have dtypes or dimensions that it lacks.
        """
        made, cache = self._templates(layout), layout.cache
        # 0: the layout has no plan (it is merged of several ranks', or was read), so all of its items are looked at.
        num_items = cache.num_fixed if cache.num_fixed > 0 else len(layout.items)
        tensors = [item for item in layout.items[:num_items] if item.kind == "tensor"]
        has_all = cache.once_per_plan(
            "has index templates", lambda: {tensor_name(item) for item in tensors} <= made.keys()
        )
        if has_all:
            return made
        return cache.once_per_plan("index templates", lambda: self.templates(tensors))


def _around_name(item: Item) -> str:
    # Replicas of version 0.1 hold templates of this name: it stays "frame".
    return f"frame {item.dtype} {item.shape} {item.stride}"
