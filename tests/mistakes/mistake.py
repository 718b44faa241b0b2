"""``Mistake``: a row of the table. ``Topic``: one section of the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from textwrap import dedent


class Kind(Enum):
    """What a mistake is written in. The value is the language of its block on the page."""

    PYTHON = "python"
    COMMAND = "sh"
    SETTINGS = "yaml"


@dataclass(frozen=True)
class Mistake:
    """One mistake.

    Attributes:
        title: what the user does, or wants; a heading of the page.
        code: a few lines. Python sees the names of :mod:`tests.mistakes.home`; a command is one line; settings are YAML.
        said: where the message comes from something else than stager (Python, torch), what to do about it.
    """

    title: str
    code: str
    kind: Kind = Kind.PYTHON
    said: str = ""


@dataclass(frozen=True)
class Topic:
    """Mistakes of one kind."""

    title: str
    mistakes: Sequence[Mistake]


def python(title: str, code: str, said: str = "") -> Mistake:
    """A mistake in a program."""
    return Mistake(title, dedent(code).strip("\n"), said=said)


def command(title: str, line: str) -> Mistake:
    """A mistake on the command line."""
    return Mistake(title, line, Kind.COMMAND)


def settings(title: str, yaml: str) -> Mistake:
    """A mistake in a configuration file."""
    return Mistake(title, dedent(yaml).strip("\n"), Kind.SETTINGS)
