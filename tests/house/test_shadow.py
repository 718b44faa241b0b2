"""A project may have a ``workers.py`` or a ``workers/`` of its own: stager's is imported as ``stager.workers``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.house.code_blocks import blocks_of


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the README's examples in a script, beside a module and a package that have names of our folders."""
    monkeypatch.setenv("STAGER_WORKERS__COUNT", "1")
    (tmp_path / "workers.py").write_text("MINE = True\n")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "__init__.py").write_text("MINE = True\n")
    blocks = [block.text for block in blocks_of("README.md") if block.language == "python"]
    script = "\n".join(["import workers", "assert workers.MINE", *blocks, "assert workers.MINE", "print('all done')"])
    (tmp_path / "train.py").write_text(script)
    return tmp_path


def test_readme_examples_run_as_a_script_beside_a_workers_of_the_users(project: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-W", "error", "train.py"], cwd=project, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["3", "all done"]


def test_readme_examples_run_in_a_notebook_beside_a_workers_of_the_users(project: Path) -> None:
    """In a real kernel, with the project's folder first on its path, as notebook servers start it."""
    cell = {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": [], "id": "train"}
    notebook = {
        "cells": [{**cell, "source": (project / "train.py").read_text()}],
        "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    (project / "train.ipynb").write_text(json.dumps(notebook))
    program = (
        "import sys, nbformat\n"
        "from nbclient import NotebookClient\n"
        "notebook = nbformat.read('train.ipynb', 4)\n"
        "NotebookClient(notebook, timeout=150).execute()\n"
        "print(''.join(output.get('text', '') for output in notebook.cells[0].outputs))\n"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=project, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[:2] == ["3", "all done"], result.stdout
