"""What only the ``torch`` format has: archives larger than zip first allowed, and torch's settings around it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from stager.workers.checkpoint.formats import get_format
from stager.workers.checkpoint.formats.contract import TensorSpec, TensorSpecs, evenly
from stager.workers.checkpoint.layout.layout import Layout
from stager.workers.checkpoint.layout.layout_plan import LayoutPlan
from tests.persistence.tasks import save
from tests.states import same


def write_sparse(path: Path, shapes: Sequence[tuple[int, ...]], data: Callable[[int], bytes]) -> Layout:
    """A state ``{"t": [int32 tensors]}`` of which only the first bytes of each tensor are written; the rest is a hole."""
    specs = [TensorSpec((("t", i),), (f"t.{i}",), "int32", shape, (1,)) for i, shape in enumerate(shapes)]
    laid_out = get_format("torch").lay_out(TensorSpecs.of(specs), 0, evenly(1))
    structure = ["dict", ["t"], [["list", list(range(len(specs)))]]]
    plan = LayoutPlan(laid_out.files, "state.pt", laid_out.items, structure, 1 << 20)
    [trailer] = get_format("torch").trailer(plan)([])
    layout = plan.with_objects([])
    frame = get_format("torch").headers_and_tails(layout)
    with open(path, "wb") as file:
        for index, item in enumerate(layout.items):
            os.pwrite(file.fileno(), frame(index)[0] + data(index), item.offset)
        os.pwrite(file.fileno(), trailer, layout.files[0].nbytes)
    return layout


def test_tensors_behind_the_first_4_gib_and_larger_than_that(tmp_path: Path) -> None:
    """Sparse: it takes neither memory nor disk."""
    count = (4 << 30) // 4 + 5
    write_sparse(tmp_path / "a.pt", [(3,), (count,), (2,)], lambda index: (index + 7).to_bytes(4, "little"))
    loaded = torch.load(tmp_path / "a.pt", weights_only=True, mmap=True)["t"]
    assert [tensor.shape[0] for tensor in loaded] == [3, count, 2]
    assert [int(tensor[0]) for tensor in loaded] == [7, 8, 9] and int(loaded[1][-1]) == 0


def test_more_records_than_a_zip_counted_at_first(tmp_path: Path) -> None:
    count = 66_000
    write_sparse(tmp_path / "a.pt", [(1,)] * count, lambda index: index.to_bytes(4, "little"))
    reader = torch._C.PyTorchFileReader(str(tmp_path / "a.pt"))
    assert len(reader.get_all_records()) == count + 3
    assert reader.get_record("data/65999") == (65_999).to_bytes(4, "little")


def test_what_the_user_set_for_torch_does_not_matter(run_dir: Path) -> None:
    """An offset that torch would compute from the order it writes in itself would be a wrong one."""
    config = pytest.importorskip("torch.utils.serialization", reason="torch 2.7 has these settings").config
    state = {"a": [torch.arange(n) for n in range(5)], "o": (torch.ones(3), "x")}
    with config.patch({"save.storage_alignment": 4096, "load.calculate_storage_offsets": True}):
        info = save(run_dir, state, kind="torch")
        assert same(torch.load(f"{info.path}/state.pt", weights_only=True, mmap=True), state)


def test_wrong_checksum_is_no_matter_to_torch(run_dir: Path) -> None:
    """They are 0 for every tensor; that torch.load reads them into memory, too, shows that it does not check."""
    info = save(run_dir, {"a": torch.arange(100)}, kind="torch")
    assert same(torch.load(f"{info.path}/state.pt", weights_only=True, mmap=False), {"a": torch.arange(100)})
