"""Every test proves that it left nothing behind: no child process, thread, descriptor, shared mapping, partial directory
or ``/dev/shm`` entry (:mod:`tests.leaks`)."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import Faults
from tests.leaks import Snapshot


def pytest_collection_finish() -> None:
    """The leak check collects garbage; what the imports made need not be looked through every time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs around every test. A test that ends with a crashed run's remains on purpose says so: ``@pytest.mark.remains``."""
    roots = [request.getfixturevalue("tmp_path")] if "tmp_path" in request.fixturenames else []
    if request.node.get_closest_marker("remains") is not None:
        roots = []
    before = Snapshot.take()
    yield
    problems = before.leaks(roots)
    assert not problems, "left behind: " + "; ".join(problems)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run's directory that does not exist yet."""
    return tmp_path / "run"


@pytest.fixture
def faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Faults:
    """Named points where this test makes things go wrong; arm them before the workers start."""
    return Faults(tmp_path / "faults", monkeypatch)
