"""torchdata's StatefulDataLoader in a state: docs/integrations/torchdata.md."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from stager import Checkpointer, PerRank
from tests import scripts
from tests.faults import Faults
from tests.integrations.training import Ended, Training, page_script, resumes_bit_equal
from tests.states import same

pytestmark = pytest.mark.filterwarnings("ignore")  # torchdata warns of its own code

pytest.importorskip("torchdata", reason="pip install torchdata")

from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import RandomSampler

CONFIG: dict[str, Any] = {"workers": {"count": 1}, "persistence": {"fsync": False}}


class Forked(Training):
    """The script, in processes that have imported torchdata already."""

    def run(self, out: Path, *arguments: object, check: bool = True) -> Ended:
        source = f"import warnings\nwarnings.simplefilter('ignore')\n{self.script.read_text()}"
        with warnings.catch_warnings():
            ended = scripts.run(
                source, out, *arguments, modules=("torchdata.stateful_dataloader", "stager.checkpointer")
            )
        assert not check or ended.returncode == 0, ended
        return Ended(ended.returncode, ended.stdout)


@pytest.mark.parametrize(
    ("point", "after"),
    [
        pytest.param("save.copied", 6, marks=pytest.mark.long),  # in the second epoch
        pytest.param("save.handed-over", 4, marks=pytest.mark.long),  # at the end of the first
        pytest.param("save.copied", 2, marks=pytest.mark.long),
    ],
)
def test_the_script_is_resumed_bit_equal(tmp_path: Path, faults: Faults, point: str, after: int) -> None:
    said = resumes_bit_equal(Forked(page_script("torchdata", tmp_path)), tmp_path, faults, point, after)
    assert "resumed at step 0" not in said


def batches(loader: Any) -> Iterator[torch.Tensor]:
    """Without an end: one epoch after the other."""
    while True:
        yield from loader


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_position_of_each_rank_is_kept(run_dir: Path, num_workers: int) -> None:
    def new_loader() -> Any:
        rows = torch.arange(20.0)
        sampler = RandomSampler(rows, generator=torch.Generator().manual_seed(0))
        options: dict[str, Any] = {"batch_size": 2, "num_workers": num_workers, "generator": torch.Generator()}
        return StatefulDataLoader(rows, sampler=sampler, **options)

    loader = new_loader()
    following = batches(loader)
    for _ in range(13):
        next(following)
    with Checkpointer(run_dir, CONFIG) as ckpt:
        ckpt.save(13, {"loader": PerRank(loader)})
        expected = [next(following) for _ in range(9)]
        following.close()  # type: ignore[attr-defined]  # a generator
        again = new_loader()
        ckpt.load(into={"loader": PerRank(again)})
    del loader
    resumed = batches(again)
    assert same(expected, [next(resumed) for _ in range(9)])
