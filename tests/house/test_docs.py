"""What the documents say is true: their examples run, their links lead somewhere, the reference is that of the code."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

from tests.house.code_blocks import documents
from tests.house.reference import reference

ROOT = Path(__file__).parents[2]
NOT_OF_THE_TREE = {"docs/results/NAME"}  # a place that the reader chooses
DOCUMENTS = [ROOT / name for name in (*documents(), "CONTRIBUTING.md", "CHANGELOG.md")]


def name_of(document: Path) -> str:
    return str(document.relative_to(ROOT))


def links_of(document: Path) -> list[tuple[str, str]]:
    """(path, anchor) of each link that leads to another place of the repository; the path is empty in the same document."""
    if document.suffix == ".ipynb":
        cells = json.loads(document.read_text())["cells"]
        text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    else:
        text = re.sub(r"^ *```.*?^ *```$", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)[^)]*\)", text)
    return [(path, anchor) for path, _, anchor in (link.partition("#") for link in links) if "://" not in path]


def anchors_of(document: Path) -> set[str]:
    """The anchors of a page's headings, as the site (and GitHub) name them."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "docs/tutorial.ipynb"], ids=name_of)
def test_links_lead_to_files_and_headings(document: Path) -> None:
    for path, anchor in links_of(document):
        target = document.parent / path if path else document
        assert target.exists(), path
        assert not anchor or anchor in anchors_of(target), f"{path}#{anchor}"


def test_links_are_found_with_their_anchors() -> None:
    assert ("guide.md", "what-save-costs-and-guard") in links_of(ROOT / "docs/tutorial.ipynb")
    assert ("docs/benchmarks.md", "what-came-out") in links_of(ROOT / "README.md")
    assert "what-save-costs-and-guard" in anchors_of(ROOT / "docs/guide.md")


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


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
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
