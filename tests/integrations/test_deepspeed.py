"""DeepSpeed: what its checkpoints are with stager, whoever is killed meanwhile. docs/integrations/deepspeed.md."""

from __future__ import annotations

import os
import re
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import scripts
from tests.faults import Faults
from tests.integrations.training import Ended, final, page_script, resumes_bit_equal
from tests.integrations.training import Training as Script
from tests.staging.ranks import run_ranks
from tests.states import same

pytestmark = pytest.mark.filterwarnings("ignore")  # deepspeed and its use of torch warn of what they will change

pytest.importorskip("deepspeed", reason="pip install 'stager[deepspeed]'")

BODIES = "tests.integrations.deepspeed_bodies"
STAGES = [0, pytest.param(1, marks=pytest.mark.long), 2, 3]


@pytest.fixture
def out(tmp_path: Path) -> str:
    path = tmp_path / "out"
    path.mkdir()
    return str(path)


def run(body: str, num_ranks: int, tmp_path: Path, *arguments: Any) -> list[Any]:
    """What each rank returned. Leaves nothing that the next ranks would take for theirs."""
    results = run_ranks(f"{BODIES}:{body}", num_ranks, tmp_path, *arguments)
    for path in (tmp_path / "store", *tmp_path.glob("result-*.json")):
        path.unlink(missing_ok=True)
    return results


# -- what is saved and loaded -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_a_tag_is_loaded_by_deepspeed_with_stager_and_without(tmp_path: Path, out: str, stage: int) -> None:
    (names,) = run("saved_and_loaded", 1, tmp_path, out, 1, stage)
    model = "zero_pp_rank_0_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
    assert names == sorted([model] + ["bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"] * (stage > 0))


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.long), 2, pytest.param(3, marks=pytest.mark.long)])
def test_two_ranks_save_one_tag_with_the_files_of_both(tmp_path: Path, out: str, stage: int) -> None:
    names, of_other = run("saved_and_loaded", 2, tmp_path, out, 2, stage)
    assert names == of_other
    assert len(names) == {0: 1, 2: 3, 3: 4}[stage]


@pytest.mark.parametrize("stage", STAGES)
def test_what_deepspeed_has_saved_is_loaded_and_the_run_goes_on_beside_it(tmp_path: Path, out: str, stage: int) -> None:
    assert run("loaded_from_deepspeed", 1, tmp_path, out, 1, stage) == ["global_step3"]


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.long)])
def test_zero_to_fp32_reads_the_tag(tmp_path: Path, out: str, stage: int) -> None:
    assert run("consolidated", 2, tmp_path, out, 2, stage) == [4, 0]


@pytest.mark.long
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_ds_to_universal_reads_the_tag(tmp_path: Path, out: str, num_ranks: int) -> None:
    found, *_ = run("universal", num_ranks, tmp_path, out, num_ranks)
    assert "zero/0.weight/fp32.pt" in " ".join(found) and "exp_avg_sq.pt" in " ".join(found)


def test_a_damaged_file_is_named_before_it_is_loaded(tmp_path: Path, out: str) -> None:
    ((full, on_load, missing),) = run("damaged", 1, tmp_path, out)
    path = os.path.join(out, "global_step2", "mp_rank_00_model_states.pt")
    assert path in full and "hash" in full
    assert path in on_load and "load an older one with load_checkpoint(dir, tag)" in on_load
    assert path in missing


# -- when -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [0, 2, pytest.param(3, marks=pytest.mark.long)])
def test_forward_and_backward_run_while_the_snapshot_is_taken(tmp_path: Path, out: str, stage: int) -> None:
    assert run("guarded", 1, tmp_path, out, stage) == [True]


def test_latest_names_a_tag_only_when_the_files_of_all_ranks_are_there(tmp_path: Path, out: str) -> None:
    before = [["global_step1", "latest"], "global_step1"]
    after = [["global_step1", "global_step2", "latest"], "global_step2"]
    assert run("held", 2, tmp_path, out) == [[*before, *after]] * 2


def test_a_rank_that_cannot_write_fails_the_tag_on_all_ranks_and_the_next_one_is_published(
    tmp_path: Path, out: str
) -> None:
    rank_0, rank_1 = run("failed", 2, tmp_path, out)
    seen = [["global_step1", "latest"], "global_step1", [".stager.lock"], "later"]
    assert rank_0 == ["RankFailedError", *seen]
    assert rank_1 == ["StorageError", *seen]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_tag_that_is_saved_again_is_replaced_and_keeps_what_others_have_put_into_it(
    tmp_path: Path, out: str, can_exchange: bool
) -> None:
    assert run("replaced", 1, tmp_path, out, can_exchange) == [["mp_rank_00_model_states.pt", "notes.txt"]]


@pytest.mark.parametrize(
    ("point", "can_exchange", "call", "steps"),
    [
        ("deepspeed.aside", True, "load", 1),
        ("deepspeed.replaced", True, "load", 2),
        ("deepspeed.unnamed", False, "load", 1),
        pytest.param("deepspeed.aside", False, "save", 1, marks=pytest.mark.long),
        pytest.param("deepspeed.replaced", True, "save", 2, marks=pytest.mark.long),
        pytest.param("deepspeed.unnamed", False, "save", 1, marks=pytest.mark.long),
        pytest.param("deepspeed.replaced", False, "load", 2, marks=pytest.mark.long),
    ],
)
def test_killed_while_a_tag_is_replaced_it_has_its_name_and_what_users_have_put_into_it(
    tmp_path: Path, out: str, faults: Faults, point: str, can_exchange: bool, call: str, steps: int
) -> None:
    faults.arm(point, "kill")
    assert run("killed_while_replacing", 1, tmp_path, out, can_exchange) == [None]
    assert faults.fired(point)
    in_tag = ["config", "mp_rank_00_model_states.pt", "notes.txt"]
    assert run("after_such_a_kill", 1, tmp_path, out, call) == [[in_tag, steps, ["rank-00000", "replaced"]]]


def test_remains_of_a_killed_run_with_more_ranks_go_with_the_first_save(tmp_path: Path, out: str) -> None:
    found = [".stager/rank-00000", ".stager/rank-00001", ".stager/rank-00002"]
    assert run("remains", 2, tmp_path, out, 2) == [[found, "global_step1"]] * 2


def test_a_save_that_raised_in_the_middle_is_taken_back(tmp_path: Path, out: str) -> None:
    assert run("interrupted", 1, tmp_path, out) == [["after", "latest"]]


def test_a_file_beside_the_tags_is_there_when_the_call_returns(tmp_path: Path, out: str) -> None:
    tag = ["bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt"]
    assert run("beside", 1, tmp_path, out) == [[["global_step1", "pytorch_model.bin"], tag]]


def test_the_attribute_alone_will_do_and_then_saves_wait(tmp_path: Path, out: str) -> None:
    assert run("only_the_attribute", 2, tmp_path, out)[0] == "global_step1"


def test_what_cannot_be_meant_is_refused(tmp_path: Path, out: str) -> None:
    (said,) = run("refused", 1, tmp_path, out)
    assert "got a Linear" in said["model"]
    assert "safetensors" in said["format"] and "take it out" in said["format"]
    assert "persistence.format is dcp" in said["dcp"]
    assert "persistence.name is 'x-{step}'" in said["name"] and "take it out" in said["name"]
    assert "persistence.incremental is true" in said["links"] and "take it out" in said["links"]
    assert "persistence.tolerate_failures is 2" in said["tolerated"]
    assert "loading.allow_pickle is false" in said["no pickle"] and "set it to true" in said["no pickle"]
    for tag in ("latest", "latest/a", "./latest", "latest_universal"):
        assert "is the file that names the newest tag; give another tag" in said[f"tag {tag}"]
    for tag in (".stager", ".stager/a"):
        assert f"stager writes in {out}/.stager" in said[f"tag {tag}"]
    for tag in ("", ".", "..", "/a"):
        assert f"is no directory in {out}; give a name" in said[f"tag {tag}"]
    assert f"{out}/a-file is no directory; move it away" in said["tag a-file"]
    assert "ranks.together is true" in said["together"]
    assert "arena.when_full is skip" in said["skip"]
    assert "use_node_local_storage" in said["local"]
    assert "checkpoint.writer" in said["writer"]
    assert "call use(engine) once" in said["twice"]
    assert "before create()" in said["early"]
    assert "no .stager directory" in said["no tag"]
    assert "is closed" in said["closed"]


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[str]:
    """A directory on another file system, where there is one."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else tmp_path) as directory:
        yield directory


def test_a_file_beside_the_tags_is_written_where_deepspeed_would_write_it(
    tmp_path: Path, out: str, elsewhere: str
) -> None:
    (said,) = run("beside_elsewhere", 1, tmp_path, out, elsewhere)
    assert f"{out}/sub" in said["no directory"] and "does not exist; create it" in said["no directory"]
    assert said["far"] == ["m.bin"]
    assert said["latest"] == "global_step1"
    assert said["tag"] == [
        "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
        "m.bin",
        "mp_rank_00_model_states.pt",
    ]


# -- all ranks raise in the same call ---------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.long)])  # ZeRO 3 talks while it saves
@pytest.mark.parametrize(
    ("where", "rank_0", "rank_1"),
    [
        ("save on 0", "StorageError", "RankFailedError"),
        ("save on 1", "RankFailedError", "StorageError"),
        ("scripts", "StorageError", "RankFailedError"),
        ("directory", "StorageError", "RankFailedError"),
        ("area of rank 1", "RankFailedError", "StorageError"),
        ("weights", "StorageError", "RankFailedError"),
    ],
)
def test_what_one_rank_alone_cannot_do_is_raised_by_all_in_the_same_call(
    tmp_path: Path, out: str, where: str, rank_0: str, rank_1: str, stage: int
) -> None:
    then = [None, None, "global_step1"]
    assert run("failed_alone", 2, tmp_path, out, where, stage) == [[rank_0, *then], [rank_1, *then]]


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("call", ["save", "load", "weights", "warn"])
def test_a_failure_that_one_rank_cannot_report_is_raised_by_all_in_the_next_call(
    tmp_path: Path, out: str, failing: int, call: str
) -> None:
    then = [None] if call == "weights" else [None, "later"]
    first = ["RankFailedError", "RankFailedError"]
    first[failing] = "OSError"
    results = run("known_on_one_rank", 2, tmp_path, out, failing, call)
    assert results == [[None if call == "warn" else problem, *then] for problem in first]


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.long)])
def test_a_file_that_is_damaged_for_one_rank_is_an_error_of_all_before_any_loads(
    tmp_path: Path, out: str, stage: int
) -> None:
    assert (
        run("damaged_for_one", 2, tmp_path, out, stage)
        == [["CorruptCheckpointError", None, 1, *([None] if stage < 3 else [])]] * 2
    )


def test_tags_that_differ_between_ranks_are_refused_on_all(tmp_path: Path, out: str) -> None:
    assert run("differing_tags", 2, tmp_path, out) == [["InconsistentRanksError", "ArgumentError", None]] * 2


# -- whole scripts ----------------------------------------------------------------------------------------------------


class Forked(Script):
    """The script, in processes that have imported DeepSpeed already."""

    def run(self, out: Path, *arguments: object, check: bool = True) -> Ended:
        source = f"import warnings\nwarnings.simplefilter('ignore')\n{self.script.read_text()}"
        with warnings.catch_warnings():
            ended = scripts.run(source, out, *arguments, modules=(BODIES,))
        assert not check or ended.returncode == 0, ended
        return Ended(ended.returncode, ended.stdout)


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STAGER_WORKERS__COUNT", "1")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    return page_script("deepspeed", tmp_path)


def test_killed_in_the_middle_of_a_save_it_resumes_bit_equal(script: Path, tmp_path: Path, faults: Faults) -> None:
    said = resumes_bit_equal(Forked(script), tmp_path, faults, "save.copied", 7)  # of each tag's two files, the second
    # The tag of step 12, unless its files were not all there yet.
    assert re.search(r"resumed at step (4|8|12)\n", said) is not None


@pytest.mark.parametrize(
    ("stage", "point", "after"),
    [
        (2, "save.copied", 3),
        (0, "deepspeed.written", 3),
        pytest.param(1, "deepspeed.collected", 3, marks=pytest.mark.long),
        pytest.param(2, "deepspeed.published", 3, marks=pytest.mark.long),
        pytest.param(3, "save.handed-over", 3, marks=pytest.mark.long),
        pytest.param(3, "deepspeed.collected", 3, marks=pytest.mark.long),
    ],
)
def test_two_ranks_resume_bit_equal(
    script: Path, tmp_path: Path, faults: Faults, monkeypatch: pytest.MonkeyPatch, stage: int, point: str, after: int
) -> None:
    whole, broken = str(tmp_path / "whole"), str(tmp_path / "broken")
    run("page", 2, tmp_path, str(script), whole, 2, stage)
    faults.arm(point, f"kill after={after}")
    with monkeypatch.context() as killing:
        killing.setenv("STAGER_TEST_IS_KILLED", "yes")
        assert run("page", 2, tmp_path, str(script), broken, 2, stage) == [None, None]
    assert faults.fired(point)
    assert run("page", 2, tmp_path, str(script), broken, 2, stage) == ["trained", "trained"]
    assert same(final(Path(whole)), final(Path(broken)))


@pytest.mark.long
@pytest.mark.parametrize(
    "point", ["save.copied", "save.handed-over", "deepspeed.written", "deepspeed.published", "part.written"]
)
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_script_by_itself_and_by_torchrun_resumes_bit_equal(
    script: Path, tmp_path: Path, faults: Faults, point: str, num_ranks: int
) -> None:
    """At a worker's point: first the worker is killed, and replaced; a save later, the trainer is."""
    if point == "part.written":
        faults.arm(point, "kill after=1")
    where = "save.handed-over" if point == "part.written" else point
    resumes_bit_equal(Script(script, num_ranks), tmp_path, faults, where, 3)
    assert faults.fired(point)
