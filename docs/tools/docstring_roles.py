"""An extension of griffe, which reads the docstrings for the site.

Docstrings are for readers of the source and of ``help()``: they name code as ``:meth:`~package.Class.name``` or in double
backquotes, as Python's own do. Markdown has single backquotes for it.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

_BARE_ERRORS = re.compile(r"^( +)(\w+Error(?:, \w+Error)*)$", re.MULTILINE)
_ROLE = re.compile(r":(?:class|meth|func|mod|attr|exc|data):`(~?)([^`]+)`")


class MarkdownDocstrings(Extension):
    """Rewrites each docstring as Markdown."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """Names of code in single backquotes. Errors that stand in ``Raises:`` without a reason get one: griffe drops them."""
    text = _BARE_ERRORS.sub(r"\1\2: see there.", text)
    text = _ROLE.sub(lambda match: f"`{match[2].rpartition('.')[2] if match[1] else match[2]}`", text)
    return re.sub(r"(?<!`)``(?!`)([^`]+)``(?!`)", r"`\1`", text)
