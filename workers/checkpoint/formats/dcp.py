"""The ``dcp`` format: a stock ``torch.distributed.checkpoint`` directory.

Each item is what ``torch.save`` writes for it (``torch_save.py``): a zip archive whose one large record is the raw storage.
Stock ``FileSystemReader`` finds the item in ``.metadata``, a pickled ``Metadata`` (``dcp_index.py``), and reads it with
``torch.load``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from stager.workers.checkpoint.formats.contract import (
    BlobSizes,
    HeadersAndTails,
    Split,
    TensorLayout,
    TensorSpec,
    Trailer,
    lay_out_blobs,
    no_trailer,
)
from stager.workers.checkpoint.formats.dcp_index import dcp_index, tensor_name
from stager.workers.checkpoint.layout.layout import Item, Layout
from stager.workers.checkpoint.layout.plan_cache import Templates
from stager.workers.errors import UnstageableError

if TYPE_CHECKING:
    from stager.workers.checkpoint.formats.object_pickle import PickledObject
    from stager.workers.checkpoint.layout.layout_plan import LayoutPlan

METADATA_NAME = ".metadata"

row_major = False
one_file = False
has_recipes = True
has_chunks = True


def holds(dtype: str) -> bool:
    """``torch.save`` writes every dtype."""
    return True


def object_file_name(rank: int) -> str:
    """Objects have a file of their own, so that the offsets of tensors never change."""
    return f"__{rank}_objects.distcp"


def lay_out(tensors: Sequence[TensorSpec], rank: int, split: Split) -> TensorLayout:
    """Make each tensor an archive of its own."""
    from stager.workers.checkpoint.formats.torch_save import header_and_tail

    sizes = []
    for spec in tensors:
        try:
            head, tail = header_and_tail(spec.dtype, spec.shape, spec.stride)
        except Exception as error:
            raise UnstageableError(spec.describe(), f"torch.save cannot write {spec.dtype}: {error}") from error
        sizes.append(BlobSizes(spec, len(head), spec.nbytes, len(tail)))
    return lay_out_blobs(sizes, lambda file: f"__{rank}_{file}.distcp", split)


def templates(tensors: Sequence[Item]) -> Templates:
    """Make header and tail for each (dtype, shape, stride), and the pieces of ``.metadata``."""
    from stager.workers.checkpoint.formats.dcp_templates import index_templates
    from stager.workers.checkpoint.formats.torch_save import header_and_tail

    around = {_around_name(item): header_and_tail(item.dtype, item.shape, item.stride) for item in tensors}
    return {**around, **index_templates(tensors)}


def _around_name(item: Item) -> str:
    # Replicas of version 0.1 hold templates of this name: it stays "frame".
    return f"frame {item.dtype} {item.shape} {item.stride}"


def _templates(layout: Layout) -> Templates:
    """Return the templates that came with the plan; make them, with torch, for a layout from elsewhere."""
    cache = layout.cache
    if cache.templates is not None:
        return cache.templates
    tensors = [item for item in layout.items if item.kind == "tensor"]
    return cache.once_per_plan("templates", lambda: templates(tensors))


def headers_and_tails(layout: Layout) -> HeadersAndTails:
    """Take header and tail from the templates."""
    made = _templates(layout)

    def around(index: int) -> tuple[bytes, bytes]:
        item = layout.items[index]
        if item.kind != "tensor":
            return b"", b""
        head, tail = made[_around_name(item)]
        return head, tail

    return around


def object_blob(value: object, leaf: int = 0) -> PickledObject:
    """Pickle an object."""
    from stager.workers.checkpoint.formats.object_pickle import pickle_object

    return pickle_object(value, leaf)


def trailer(plan: LayoutPlan) -> Trailer:
    """None: a file of objects ends with the last of them."""
    return no_trailer


def index_files(layout: Layout, save_id: str, directory: str) -> dict[str, bytes]:
    """Make ``.metadata`` as ``dcp.save`` writes it."""
    return {METADATA_NAME: dcp_index(layout, _index_templates(layout), save_id, directory)}


def _index_templates(layout: Layout) -> Templates:
    """Return templates for all ranks' tensors: this rank's, unless others have dtypes or dimensions that it lacks."""
    made, cache = _templates(layout), layout.cache
    tensors = [item for item in layout.items[: cache.num_fixed or None] if item.kind == "tensor"]
    if cache.once_per_plan("has templates", lambda: {tensor_name(item) for item in tensors} <= made.keys()):
        return made
    return cache.once_per_plan("index templates", lambda: templates(tensors))
