"""The tutorial runs from top to bottom in a real notebook kernel, and prints what its text says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

NOTEBOOK = Path(__file__).parents[2] / "docs" / "tutorial.ipynb"

# In a process of its own: the kernel's client leaves threads.
PROGRAM = """
import sys, nbformat
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], 4)
NotebookClient(notebook, timeout=150).execute()
for cell in notebook.cells:
    for output in cell.get("outputs", []):
        print("".join(output.get("text", "")), end="")
"""


def test_tutorial_runs_and_prints_what_it_says(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, NOTEBOOK], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert [line for line in result.stdout.splitlines() if line.startswith(("loaded", "weights", "goes", "steps"))] == [
        "loaded step 2 epoch 2",
        "weights are back: True",
        "loaded step 1 epoch 1",
        "goes on with step 2",
        "steps on the disk: [0, 1, 2, 3, 4]",
    ]
    assert "0 True\n1 True\n2 False\n" in result.stdout
    assert result.stdout.endswith("True\n")  # stock torch read what stager wrote
    assert list(tmp_path.iterdir()) == []


def test_tutorial_is_stored_without_outputs() -> None:
    """The site runs it, so that its outputs are those of the code."""
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert [cell["id"] for cell in cells if cell.get("outputs") or cell.get("execution_count")] == []
