"""The page of mistakes says what stager says."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests import scripts
from tests.mistakes.home import Home
from tests.mistakes.mistake import python
from tests.mistakes.outcome import outcome_of
from tests.mistakes.page import PAGE, SILENT, versions
from tests.mistakes.topics import TOPICS

# In a process of its own: a mistake may change anything. Warnings are part of what is said, and no errors.
PROGRAM = """
import sys, warnings
from pathlib import Path
from tests.mistakes.page import page
warnings.simplefilter("default")
Path(sys.argv[2]).write_text(page(Path(sys.argv[1])))
"""
AGAIN = "python -m tests.mistakes makes the page again; look at what changed"


def test_page_is_what_is_said_today(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if versions() not in PAGE.read_text():
        pytest.skip(f"some messages are Python's and torch's, and the page was not made with {versions()}")
    monkeypatch.setenv("STAGER_WORKERS__COUNT", "1")  # as in __main__.py: most of the time is the start of workers
    modules = ("tests.mistakes.page", "stager.checkpointer", "stager.cli.app", "typer.testing")
    assert scripts.run(PROGRAM, tmp_path / "made", tmp_path / "page.md", modules=modules).returncode == 0
    assert (tmp_path / "page.md").read_text() == PAGE.read_text(), AGAIN


def test_titles_are_different_within_a_topic_and_there_are_many() -> None:
    for topic in TOPICS:
        twice = [title for title, count in Counter(mistake.title for mistake in topic.mistakes).items() if count > 1]
        assert not twice
    assert sum(len(topic.mistakes) for topic in TOPICS) >= 150


def test_mistake_that_says_nothing_has_an_explanation() -> None:
    blocks = PAGE.read_text().split("\n### ")
    silent = {block.partition("\n")[0] for block in blocks if SILENT in block}
    explained = {mistake.title for topic in TOPICS for mistake in topic.mistakes if mistake.said}
    assert silent <= explained


def test_what_is_raised_warned_logged_printed_and_in_a_future_is_part_of_the_outcome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAGER_WORKERS__COUNT", "1")
    monkeypatch.chdir(tmp_path)
    home = Home(tmp_path)
    code = """
    import logging, warnings

    print("here")
    logging.getLogger("stager").warning("beware")
    warnings.warn("old")
    raise ValueError(Path("runs").absolute())
    """
    try:
        said = outcome_of(python("all", code), home)
    finally:
        home.close()
    assert said.splitlines() == [
        "warning in the log: beware",
        "ValueError: /home/me/runs",
        "printed: here",
        "UserWarning: old",
    ]
