"""Every state of the corpus, in every format and way to load, gives what torch.save and torch.load give.

``pending.txt`` lists the trials that still fail. A trial that fails and is not listed fails its test; so does one that is
listed and passes: then take its line out.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import fork_server
from tests.states.corpus import CORPUS, State
from tests.states.trial import FORMATS, WAYS, Bench

_PENDING = Path(__file__).with_name("pending.txt")
_TIMEOUT_SECS = 120.0
_ALL_WAYS = "all"  # of a trial whose process ends


def _pending() -> set[tuple[str, ...]]:
    """The listed trials: (state, format, way)."""
    lines = [line.partition("#")[0].split() for line in _PENDING.read_text().splitlines()]
    return {(state, file_format, way) for state, file_format, *ways in filter(None, lines) for way in ways}


PENDING = _pending()


@pytest.fixture(scope="module", params=FORMATS)
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """One Checkpointer of each format for all states that cannot end this process."""
    made = Bench(request.param, str(tmp_path_factory.mktemp(request.param)))
    yield made
    made.close()


def _skip_without(state: State) -> None:
    for package in state.needs:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed; it is needed for this test only")


def _judge(state: State, file_format: str, problems: dict[str, list[str]]) -> None:
    """Compare what failed with what is listed in ``pending.txt``."""
    listed = {way for name, of, way in PENDING if (name, of) == (state.name, file_format)}
    failed = {way for way, lines in problems.items() if lines}
    new = [line for way in sorted(failed - listed) for line in problems[way]]
    assert not new, "\n".join(new)
    assert failed == listed, f"passes now; take it out of pending.txt: {sorted(listed - failed)}"


@pytest.mark.parametrize("name", [state.name for state in CORPUS.values() if not state.is_dangerous])
def test_state_comes_back_as_torch_gives_it(bench: Bench, name: str) -> None:
    state = CORPUS[name]
    _skip_without(state)
    _judge(state, bench.file_format, {way: bench.trial(state, way) for way in WAYS})


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("name", [state.name for state in CORPUS.values() if state.is_dangerous])
def test_state_that_may_end_its_process_comes_back_or_is_refused(name: str, file_format: str, tmp_path: Path) -> None:
    state = CORPUS[name]
    _skip_without(state)
    answer, errors = tmp_path / "answer", tmp_path / "errors"
    pid = fork_server.shared().start(
        "tests.states.test_states:answer_trials",
        [name, file_format, str(tmp_path)],
        stdout=answer,
        stderr=errors,
        modules=["tests.states.test_states"],
    )
    code = fork_server.shared().wait(pid, _TIMEOUT_SECS)
    problems = json.loads(answer.read_text().splitlines()[-1]) if code == 0 else {_ALL_WAYS: [_ending(code, errors)]}
    _judge(state, file_format, problems)


def _ending(code: int, errors: Path) -> str:
    return f"the process ended with exit code {code}: {errors.read_text()[-1000:]}"


def answer_trials(name: str, file_format: str, directory: str) -> None:
    """In a process of its own: print the problems of each way, as JSON."""
    state = CORPUS[name]
    with state.world():
        bench = Bench(file_format, str(Path(directory, "run")))
        problems = {way: bench.trial(state, way) for way in WAYS}
        bench.close()
    print(json.dumps(problems), flush=True)


def test_corpus_is_large_and_of_many_kinds() -> None:
    assert len(CORPUS) >= 400
    assert len({state.kind for state in CORPUS.values()}) >= 25


def test_pending_names_trials_that_exist() -> None:
    assert {name for name, _, _ in PENDING} <= CORPUS.keys()
    assert {of for _, of, _ in PENDING} <= set(FORMATS)
    assert {way for _, _, way in PENDING} <= {*WAYS, _ALL_WAYS}
