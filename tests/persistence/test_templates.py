"""Templates: what the trainer makes is what a process with torch would make, and one for each kind is enough."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stager.workers.checkpoint.formats import FORMATS
from stager.workers.checkpoint.layout.layout_plan import templates_from_bytes, templates_to_bytes
from stager.workers.checkpoint.write.write_task import from_record, read_layout, record_name, to_record
from tests.persistence.tasks import make_task
from tests.states import everything


@pytest.mark.parametrize(
    "made", [{}, {"none": ()}, {'a\n"ä': (b"", b"\n{}", bytes(range(256))), "b": (b"x",)}], ids=len
)
def test_pieces_come_back(made: dict[str, tuple[bytes, ...]]) -> None:
    assert templates_from_bytes(templates_to_bytes(made)) == made


def test_plan_brings_what_would_be_made_here(run_dir: Path) -> None:
    layout = read_layout(make_task(run_dir, everything()))
    assert layout.cache.templates == FORMATS["dcp"].templates([item for item in layout.items if item.kind == "tensor"])


def test_equal_kinds_have_one_template(run_dir: Path) -> None:
    few, many = (
        read_layout(make_task(run_dir, {str(i): torch.ones(3, 4) for i in range(count)})).cache.templates
        for count in (1, 500)
    )
    assert few == many


@pytest.mark.parametrize("kind", FORMATS)
def test_record_has_none(run_dir: Path, kind: str) -> None:
    """Nothing that is read from a disk gets into ``.metadata``; what a commit needs is made anew."""
    job = make_task(run_dir, everything(), kind=kind)
    _, layout = from_record(to_record(job), record_name(job.spec.rank), str(run_dir))
    assert layout.cache.templates is None
    file_format = FORMATS[kind]
    assert file_format.index_files(layout, "0a", "/d") == file_format.index_files(read_layout(job), "0a", "/d")
