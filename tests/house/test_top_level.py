"""The top level of the repository: what a newcomer lists first has nothing that a test or a training run has left there."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = {".ci", "configs", "docs", "stager", "tests", "workers"}
FILES = {
    ".gitignore",
    ".pre-commit-config.yaml",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "Makefile",
    "README.md",
    "constraints.txt",
    "mkdocs.yml",
    "pyproject.toml",
}


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="this is no checkout of git")
def test_only_what_belongs_there_is_tracked() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = [path.split("/") for path in listed.split("\0") if path]
    assert {path[0] for path in paths if len(path) > 1} == FOLDERS
    assert {path[0] for path in paths if len(path) == 1} == FILES
