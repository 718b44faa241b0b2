"""What the documents say is true: their examples run, their links lead somewhere, the reference is that of the code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from stager.cli import app
from tests import scripts
from tests.house.reference import reference

ROOT = Path(__file__).parents[2]
NOT_OF_THE_TREE = {"docs/results/NAME"}  # a place that the reader chooses
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_readme_examples_run_and_leave_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In processes of the fork server; ``test_shadow.py`` runs them in a fresh interpreter."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    script = "\n".join(blocks)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # the second run resumes from the first
        assert scripts.run(f"import os; os.chdir({str(tmp_path)!r})\n{script}").returncode == 0
    assert [path.name for path in sorted((tmp_path / "runs/first").glob("step-*"))] == [
        "step-00000000",
        "step-00000100",
        "step-00000200",
    ]
    for command in (["ls"], ["inspect"], ["verify"]):
        assert CliRunner().invoke(app, [*command, "runs/first"]).exit_code == 0


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files(document: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text())
    missing = [link for link in links if "://" not in link and not (document.parent / link).exists()]
    assert not missing


def test_configuration_reference_is_that_of_the_code() -> None:
    assert (ROOT / "docs/configuration.md").read_text() == reference()


def test_make_targets_in_the_documents_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {name for path in DOCUMENTS for name in re.findall(r"`make ([a-z-]+)`", path.read_text())}
    assert named <= targets


def test_tests_named_in_the_fault_table_exist() -> None:
    text = (ROOT / "docs/faults.md").read_text()
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    missing = [name for name in re.findall(r"::(test_\w+)", text) if f"def {name}(" not in sources]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_source_files_named_in_a_document_exist(document: Path) -> None:
    named = re.findall(r"(?<![\w/.-])(?:stager|workers|tests|configs|docs)/[\w/.-]*\w/?", document.read_text())
    missing = {name for name in named if not (ROOT / name).exists()} - NOT_OF_THE_TREE
    assert not missing


def test_source_files_are_named_in_several_documents() -> None:
    """The pattern of the test above finds paths at all."""
    named = {path.name for path in DOCUMENTS if re.search(r"(?:stager|workers)/[\w/]+\.py", path.read_text())}
    assert {"guide.md", "format.md", "safety.md", "stress.md"} <= named


def test_folders_in_contributing_are_those_of_the_sources() -> None:
    table = re.findall(r"^\| `((?:stager|workers)/[\w/]*)` \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    folders = {
        f"{path.parent.relative_to(ROOT)}/"
        for top in ("stager", "workers")
        for path in (ROOT / top).rglob("__init__.py")
    }
    assert len(table) == len(set(table))
    assert set(table) == {folder for folder in folders if not folder.startswith("stager/workers")}


def test_each_folder_says_what_is_in_it() -> None:
    for top in ("stager", "workers"):
        for path in (ROOT / top).rglob("__init__.py"):
            docstring = ast.get_docstring(ast.parse(path.read_text()))
            assert docstring and docstring.split("\n")[0].endswith((".", ":", "?")), path


def test_terms_of_the_glossary_stand_there_once() -> None:
    text = (ROOT / "docs/glossary.md").read_text()
    rows = re.findall(r"^\| (\*\*.*?) \|", text, re.MULTILINE)
    terms = [term for row in rows for term in re.findall(r"\*\*(.*?)\*\*", row)]
    assert len(terms) > 50
    assert len(terms) == len(set(terms))
