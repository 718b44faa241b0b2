"""Megatron-Core's checkpoints, and Megatron-Bridge's manager with a double of it. docs/integrations/megatron-bridge.md."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from tests.staging.ranks import run_ranks

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None, reason="pip install --no-deps megatron-core megatron-bridge"
)

BODIES = "tests.integrations.megatron_bodies"
EXPECTED_MODEL = {"same": [0.0, 1.0, 2.0, 3.0, 4.0], "scalar": 1.0}


def run(body: str, num_ranks: int, tmp_path: Path, *arguments: Any) -> list[Any]:
    """What each rank returned. Leaves nothing that the next ranks would take for theirs."""
    results = run_ranks(f"{BODIES}:{body}", num_ranks, tmp_path, *arguments)
    for path in (tmp_path / "store", *tmp_path.glob("result-*.json")):
        path.unlink(missing_ok=True)
    return results


def expected(rank: int, num_ranks: int) -> dict[str, Any]:
    rows = [[3.0 * row, 3.0 * row + 1, 3.0 * row + 2] for row in range(8)]
    own = rows[rank * 8 // num_ranks : (rank + 1) * 8 // num_ranks]
    return {"model": {"sharded": own, **EXPECTED_MODEL}, "rng": {"of": "rank 0", "scale": 1.0}, "iteration": 7}


@pytest.mark.parametrize("fully_parallel", [False, True])
def test_two_ranks_save_and_megatron_loads_it_on_two_and_on_one(tmp_path: Path, fully_parallel: bool) -> None:
    path = str(tmp_path / "iter_0000007")
    assert run("saved", 2, tmp_path, path, 2, fully_parallel) == [expected(0, 2), expected(1, 2)]
    assert run("loaded_alone", 1, tmp_path, path) == [expected(0, 1)]


def test_a_directory_that_is_saved_into_again_has_the_new_values(tmp_path: Path) -> None:
    assert run("saved_twice", 1, tmp_path, str(tmp_path / "iter_0000007")) == [expected(0, 1)]


def test_a_rank_that_cannot_write_fails_the_save_on_all_ranks(tmp_path: Path) -> None:
    results = run("failed", 2, tmp_path, str(tmp_path / "iter_0000007"))
    assert results == [["{1: 'StorageError'}", False, False]] * 2


def test_the_manager_saves_with_stagers_strategy_and_latest_names_it_when_all_is_there(tmp_path: Path) -> None:
    """With a double of Megatron-Bridge, which needs CUDA."""
    path = str(tmp_path / "iter_0000007")
    results = run("managed", 2, tmp_path, path)
    assert results == [[False, "iter_0000007", expected(rank, 2)] for rank in range(2)]


def test_what_cannot_be_meant_is_refused(tmp_path: Path) -> None:
    ((written, together, skipped, sharded),) = run("refused", 1, tmp_path)
    assert "persistence.format is torch;" in written and "take it out" in written
    assert "ranks.together is True;" in together
    assert "arena.when_full is skip;" in skipped
    assert "checkpoint.ckpt_format is fsdp_dtensor" in sharded


def test_megatron_bridge_takes_its_save_strategy_from_the_context() -> None:
    """What the manager relies on, in the source of the installed version: it cannot be imported without CUDA."""
    try:
        found = importlib.metadata.files("megatron-bridge") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("pip install --no-deps megatron-bridge")
    (source,) = [file for file in found if str(file).endswith("bridge/training/checkpointing.py")]
    tree = ast.parse(Path(str(source.locate())).read_text())
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    save = functions["save_checkpoint"]
    assert "checkpointing_context" in [argument.arg for argument in save.args.args]
    text = ast.unparse(save)
    assert "save_strategy = checkpointing_context['save_strategy']" in text
    assert "async_save_request = dist_checkpointing.save(" in text and "add_finalize_fn" in text
    if "CheckpointManager" in [node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]:  # since 0.4
        assert "checkpointing_context" in functions and "finalize_async_saves" in functions
