"""The site's pages: each is in the navigation, and every public name is in the API reference."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

import stager
from stager.workers import errors

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
NOT_IN_THE_REFERENCE = {"_ReplicationStager", "__version__"}  # another name of ReplicationStager; a text


def documented() -> list[str]:
    """The names that pages of the reference ask mkdocstrings for."""
    pages = "".join(path.read_text() for path in sorted((DOCS / "api").glob("*.md")))
    return re.findall(r"^::: stager\.(\w+)$", pages, re.MULTILINE)


def in_navigation(entry: Any) -> list[str]:
    """The pages of a part of the navigation."""
    if isinstance(entry, str):
        return [entry]
    values = entry if isinstance(entry, list) else entry.values()
    return [page for value in values for page in in_navigation(value)]


def test_every_public_name_is_in_the_reference_once() -> None:
    names = documented()
    assert len(names) == len(set(names))
    assert set(names) == {line.split()[3] for line in _stub_lines()} - NOT_IN_THE_REFERENCE


def _stub_lines() -> list[str]:
    stub = Path(stager.__file__).with_suffix(".pyi").read_text()
    return [line for line in stub.splitlines() if line.startswith("from ")]


def test_tree_of_errors_in_the_reference_is_that_of_the_code() -> None:
    page = (DOCS / "api/errors.md").read_text()
    tree = re.search(r"```text\n(.*?)```", page, re.DOTALL)
    assert tree is not None
    lines = [f"    {line}" if line else "" for line in tree[1].rstrip().splitlines()]
    assert "\n".join(lines) in (errors.__doc__ or "")


def test_every_page_is_in_the_navigation_once() -> None:
    # mkdocs.yml has tags of mkdocs' own in other places only
    listed = in_navigation(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    pages = {str(path.relative_to(DOCS)) for kind in ("*.md", "*.ipynb") for path in DOCS.rglob(kind)}
    assert len(listed) == len(set(listed))
    assert set(listed) == {page for page in pages if not page.startswith("results/")}
