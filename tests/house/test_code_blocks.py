"""Every code block of the README and of the site runs (:mod:`tests.house.code_blocks`)."""

from __future__ import annotations

import os
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from stager import Checkpointer, ConfigError
from tests import scripts
from tests.house.block_names import Namespace
from tests.house.code_blocks import (
    MAY_SAY_NO,
    NOT_RUN,
    ROOT,
    RUN_ELSEWHERE,
    Block,
    all_commands,
    blocks_of,
    commands_of,
    documents,
    needs_process,
    run_block,
)

RUN = """
import os, sys
from tests.house.code_blocks import run_document
os.chdir(sys.argv[3])
sys.path.insert(0, "")
run_document(sys.argv[1], sys.argv[2])
"""
MODULES = ("tests.house.block_names", "stager.checkpointer", "stager.cli.app", "typer.testing")
WITH_BLOCKS = [document for document in documents() if blocks_of(document) and document not in RUN_ELSEWHERE]


@pytest.fixture(autouse=True)
def one_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """For each Checkpointer: most of a short program's time is the start of its workers."""
    monkeypatch.setenv("STAGER_WORKERS__COUNT", "1")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that commands in the documents look at."""
    directory = tmp_path_factory.mktemp("prepared") / "run"
    model = torch.nn.Linear(8, 8)
    with Checkpointer(directory) as ckpt:
        for step in (0, 20, 100):
            ckpt.save(step, {"model": model.state_dict(), "epoch": step // 20})
    return directory


def run(document: str, prepared: Path, directory: Path) -> None:
    """In a process of the fork server; ``test_shadow.py`` runs the README's examples in a fresh interpreter."""
    assert scripts.run(RUN, document, prepared, directory, modules=MODULES).returncode == 0


@pytest.mark.parametrize("document", [name for name in WITH_BLOCKS if name != "README.md"])
def test_code_blocks_of_a_document_run(document: str, prepared: Path, tmp_path: Path) -> None:
    if any(map(needs_process, blocks_of(document))):
        run(document, prepared, tmp_path)
    else:
        for block in blocks_of(document):
            run_block(block)


def test_code_blocks_of_the_readme_run_and_leave_a_checkpoint_and_resume_from_it(
    prepared: Path, tmp_path: Path
) -> None:
    assert [block.language for block in blocks_of("README.md")].count("python") == 2
    run("README.md", prepared, tmp_path)
    for made in ("a.pt", "stager.yaml"):
        os.unlink(tmp_path / made)  # commands do not overwrite files
    shutil.rmtree(tmp_path / "hf")
    run("README.md", prepared, tmp_path)
    names = [path.name for path in sorted((tmp_path / "runs/first").glob("step-*"))]
    assert names == ["step-00000000", "step-00000100", "step-00000200"]


def test_each_reason_not_to_run_a_command_is_in_use() -> None:
    commands = [command for _, command in all_commands()]
    assert [start for start in NOT_RUN if not any(command.startswith(start) for command in commands)] == []
    names = {command.split()[1] for command in commands if command.startswith("stager ")}
    assert set(MAY_SAY_NO) <= names


def test_modules_that_commands_name_exist() -> None:
    named = {match[1] for _, command in all_commands() if (match := re.search(r"python -m (tests\.[\w.]+)", command))}
    assert named
    assert [name for name in named if find_spec(name) is None] == []


@pytest.mark.parametrize(
    "block", [("python", "1 / 0"), ("sh", "stager verify ."), ("sh", "rm -r /"), ("yaml", "arena: {bufers: 3}")]
)
def test_block_that_fails_fails_its_document(
    block: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ZeroDivisionError, AssertionError, ConfigError)):
        run_block(Block("docs/guide.md", 1, *block), Namespace())


def test_blocks_are_found_with_their_lines_and_without_their_indentation() -> None:
    blocks = blocks_of("docs/loading.md")
    indented = next(block for block in blocks if block.language == "yaml")
    assert indented.text.startswith("loading:\n  safe_globals:")
    assert (ROOT / "docs/loading.md").read_text().splitlines()[indented.line - 1].strip() == "loading:"


def test_commands_are_without_comments_and_in_one_line() -> None:
    block = Block(
        "a.md", 1, "sh", "stager ls runs/a   # all of them\n# only a comment\nstager plan \\\n  --params 7B\n"
    )
    assert [" ".join(command.split()) for command in commands_of(block)] == [
        "stager ls runs/a",
        "stager plan --params 7B",
    ]
