"""The page."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from tests.mistakes.home import Home
from tests.mistakes.mistake import Topic
from tests.mistakes.outcome import outcome_of
from tests.mistakes.topics import TOPICS

PAGE = Path(__file__).parents[2] / "docs" / "mistakes.md"
SILENT = "(nothing is said)"

_INTRODUCTION = """\
# Mistakes and their messages

<!-- Made by `python -m tests.mistakes` with VERSIONS; a test compares. -->

Each of these mistakes was made, and below it stands what stager says: the last line of the traceback, a warning, or what the
command prints. Numbers and paths that differ from machine to machine are left out. Search the page for words of the message
that you have.

In the programs, `state` is `{"model": model, "optimizer": optimizer, "progress": {"epoch": 3}}`, `runs/gpt` has checkpoints
of steps 100, 200 and 300, and `ckpt` is an open `Checkpointer` of `runs/live`.
"""


def versions() -> str:
    """What messages of Python and torch depend on."""
    return f"Python {sys.version_info.major}.{sys.version_info.minor} and torch {'.'.join(torch.__version__.split('.')[:2])}"


def page(directory: Path) -> str:
    """Make every mistake in ``directory``, and return the page as Markdown."""
    home = Home(directory)
    logging.getLogger("torch.distributed.checkpoint").setLevel(logging.CRITICAL)  # it logs whole tracebacks
    try:
        topics = [line for topic in TOPICS for line in _topic(topic, home)]
    finally:
        home.close()
    return "\n".join([_INTRODUCTION.replace("VERSIONS", versions()), *topics])


def _topic(topic: Topic, home: Home) -> Iterator[str]:
    yield f"## {topic.title}\n"
    for mistake in topic.mistakes:
        said = outcome_of(mistake, home) or SILENT
        yield f"### {mistake.title}\n"
        yield f"```{mistake.kind.value}\n{mistake.code}\n```\n"
        yield f"```text\n{said}\n```\n"
        if mistake.said:
            yield f"{mistake.said}\n"
