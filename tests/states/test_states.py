"""Every state of the corpus, in every format and way to load, gives what torch.save and torch.load give.

``pending.txt`` lists the trials that still fail. A trial that fails and is not listed fails its test; so does one that is
listed and passes: then take its line out.
"""

from __future__ import annotations

import importlib.util
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from tests import fork_server
from tests.states.corpus import CORPUS, State
from tests.states.survey import ENDED
from tests.states.trial import FORMATS, WAYS

# The fixture runs all trials before the first test.
pytestmark = [pytest.mark.costly_fixture, pytest.mark.timeout(900)]

Problems = dict[tuple[str, str], dict[str, list[str]]]
"""By state and format, by way: what was wrong, one line each."""

_PENDING = Path(__file__).with_name("pending.txt")


def _pending() -> set[tuple[str, ...]]:
    """The listed trials: (state, format, way)."""
    lines = [line.partition("#")[0].split() for line in _PENDING.read_text().splitlines()]
    return {(state, file_format, way) for state, file_format, *ways in filter(None, lines) for way in ways}


PENDING = _pending()


def _missing(state: State) -> list[str]:
    return [package for package in state.needs if importlib.util.find_spec(package) is None]


@pytest.fixture(scope="module")
def problems(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Problems:
    """The trials of all selected states, each format in a process of its own with one Checkpointer for all states."""
    calls = [
        item.callspec.params
        for item in request.session.items
        if item.path == Path(__file__) and hasattr(item, "callspec")
    ]
    selected = {
        file_format: [
            call["name"] for call in calls if call["file_format"] == file_format and not _missing(CORPUS[call["name"]])
        ]
        for file_format in FORMATS
    }
    directory, server = tmp_path_factory.mktemp("states"), fork_server.shared()
    pids = {
        file_format: server.start(
            "tests.states.survey:print_records",
            [selected[file_format], file_format],
            stdout=directory / file_format,
            stderr=directory / f"{file_format}-errors",
            modules=["tests.states.survey"],
        )
        for file_format in FORMATS
    }
    found: Problems = defaultdict(dict)
    for file_format, pid in pids.items():
        code = server.wait(pid)
        assert code == 0, (directory / f"{file_format}-errors").read_text()[-2000:]
        for line in (directory / file_format).read_text().splitlines():
            record = json.loads(line)
            found[record["state"], file_format][record["way"]] = record["problems"]
    return found


def _trials() -> list[Any]:
    """Each state in one format, the formats in turn; ``make long`` has the others."""
    return [
        pytest.param(name, of, marks=() if number % len(FORMATS) == place else pytest.mark.long)
        for number, name in enumerate(CORPUS)
        for place, of in enumerate(FORMATS)
    ]


@pytest.mark.parametrize(("name", "file_format"), _trials())
def test_state_comes_back_as_torch_gives_it(problems: Problems, name: str, file_format: str) -> None:
    if missing := _missing(CORPUS[name]):
        pytest.skip(f"needs {', '.join(missing)}, which only these tests use")
    found = problems[name, file_format]
    assert found.keys() >= set(WAYS) or ENDED in found, f"not all ways were tried: {sorted(found)}"
    listed = {way for state, of, way in PENDING if (state, of) == (name, file_format)}
    failed = {way for way, lines in found.items() if lines}
    new = [line for way in sorted(failed - listed) for line in found[way]]
    assert not new, "\n".join(new)
    assert failed == listed, f"passes now; take it out of pending.txt: {sorted(listed - failed)}"


def test_corpus_is_large_and_of_many_kinds() -> None:
    assert len(CORPUS) >= 400
    assert len({state.kind for state in CORPUS.values()}) >= 25


def test_pending_names_trials_that_exist() -> None:
    assert {name for name, _, _ in PENDING} <= CORPUS.keys()
    assert {of for _, of, _ in PENDING} <= set(FORMATS)
    assert {way for _, _, way in PENDING} <= {*WAYS, ENDED}
