"""The tree drawn at the top of ``workers/errors.py`` is the tree of the classes."""

from __future__ import annotations

import re

from stager.workers import errors

_LINE = re.compile(r"^    (?P<indent>(?:\|   |    )*)(?:\|-- |`-- )?(?P<name>[A-Z]\w+)   *\S")
_BRANCH = re.compile(r"[|`]-- ")


def _drawn() -> list[tuple[str, str | None]]:
    """(class, parent in the drawing) of every line of the tree, from top to bottom."""
    rows: list[tuple[str, str | None]] = []
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        match = _LINE.match(line)
        if match is None:
            continue
        depth = len(match["indent"]) // 4 + bool(_BRANCH.search(line))
        path[depth:] = [match["name"]]
        rows.append((match["name"], path[depth - 1] if depth else None))
    return rows


def _defined() -> list[tuple[str, str | None]]:
    """(class, first parent in the module) of every exception class, in the order of the file."""
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, BaseException)]
    own = {c.__name__ for c in classes}
    return [(c.__name__, next((b.__name__ for b in c.__bases__ if b.__name__ in own), None)) for c in classes]


def test_the_drawn_tree_has_the_classes_their_parents_and_their_order() -> None:
    assert _drawn() == _defined()


def test_every_error_class_says_in_one_line_whose_fault_it_is_and_what_to_do() -> None:
    for name, _ in _defined():
        summary = (getattr(errors, name).__doc__ or "").partition("\n\n")[0].strip()
        assert summary.endswith("."), f"{name}: {summary!r}"
        assert "\n" not in summary, f"{name}: {summary!r}"
