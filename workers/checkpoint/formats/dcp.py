"""The ``dcp`` format: a stock ``torch.distributed.checkpoint`` directory.

Each item is what ``torch.save`` writes for it (``torch_save.py``): a zip archive whose one big record is the raw storage.
``FileSystemReader`` finds it through ``.metadata``, a pickled ``Metadata`` (``dcp_index.py``), and reads it with
``torch.load``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from stager.workers.checkpoint.formats.contract import Framed, Frames, LaidOut, Split, TensorSpec, lay_out_blobs
from stager.workers.checkpoint.formats.dcp_index import dcp_index, tensor_name
from stager.workers.checkpoint.layout.layout import Item, Layout
from stager.workers.checkpoint.layout.templates import Templates
from stager.workers.errors import UnstageableError

if TYPE_CHECKING:
    from stager.workers.checkpoint.layout.layout_plan import LayoutPlan

METADATA_NAME = ".metadata"

row_major = False
one_file = False


def holds(dtype: str) -> bool:
    return True


def object_file_name(rank: int) -> str:
    return f"__{rank}_objects.distcp"


def lay_out(tensors: Sequence[TensorSpec], rank: int, split: Split) -> LaidOut:
    """Each tensor an archive."""
    from stager.workers.checkpoint.formats.torch_save import tensor_frame

    framed = []
    for spec in tensors:
        try:
            head, tail = tensor_frame(spec.dtype, spec.shape, spec.stride)
        except Exception as error:
            raise UnstageableError(spec.describe(), f"torch.save cannot write {spec.dtype}: {error}") from error
        framed.append(Framed(spec, len(head), spec.nbytes, len(tail)))
    return lay_out_blobs(framed, lambda file: f"__{rank}_{file}.distcp", split)


def templates(tensors: Sequence[Item]) -> Templates:
    """The frames of the tensors, one for each kind, and what ``.metadata`` is put together from."""
    from stager.workers.checkpoint.formats.dcp_templates import index_templates
    from stager.workers.checkpoint.formats.torch_save import tensor_frame

    frames = {_frame_name(item): tensor_frame(item.dtype, item.shape, item.stride) for item in tensors}
    return {**frames, **index_templates(tensors)}


def _frame_name(item: Item) -> str:
    return f"frame {item.dtype} {item.shape} {item.stride}"


def _templates(layout: Layout) -> Templates:
    """Those that came with the plan; made here, with torch, for a layout from elsewhere."""
    memo = layout.memo
    if memo.templates is not None:
        return memo.templates
    tensors = [item for item in layout.items if item.kind == "tensor"]
    return memo.of_plan("templates", lambda: templates(tensors))


def frames(layout: Layout) -> Frames:
    made = _templates(layout)

    def frame(index: int) -> tuple[bytes, bytes]:
        item = layout.items[index]
        if item.kind != "tensor":
            return b"", b""
        head, tail = made[_frame_name(item)]
        return head, tail

    return frame


def object_blob(value: object, leaf: int = 0) -> bytes:
    from stager.workers.checkpoint.formats import torch_save

    return torch_save.object_blob(value)


def closing(plan: LayoutPlan) -> None:
    """A file of objects ends with the last of them."""


def index_files(layout: Layout, save_id: str, directory: str) -> dict[str, bytes]:
    """``.metadata``, as ``dcp.save`` writes it."""
    return {METADATA_NAME: dcp_index(layout, _index_templates(layout), save_id, directory)}


def _index_templates(layout: Layout) -> Templates:
    """Those of one rank do for the others, unless they have kinds of tensors that it has none of."""
    made, memo = _templates(layout), layout.memo
    tensors = [item for item in layout.items[: memo.num_fixed or None] if item.kind == "tensor"]
    if memo.of_plan("has templates", lambda: {tensor_name(item) for item in tensors} <= made.keys()):
        return made
    return memo.of_plan("index templates", lambda: templates(tensors))
