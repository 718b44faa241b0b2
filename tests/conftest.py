"""Every test proves that it left nothing behind: no child process, thread, descriptor, shared mapping, partial directory,
``/dev/shm`` entry or temporary file (:mod:`tests.leaks`)."""

from __future__ import annotations

import gc
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import temporary  # isort: skip  # before all that may make a temporary file
from stager.config.host import usable_cores
from stager.workers.checkpoint.storage.posix import files
from stager.workers.pool import process
from tests import fork_server, prepared_workers
from tests.faults import Faults
from tests.leaks import Snapshot, temporary_leaks

process.subprocess = prepared_workers  # type: ignore[assignment]  # tests/pool takes this back


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int | None:
    """``-n auto``: one more than there are cores, because tests wait for processes that they have started."""
    return None if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ else usable_cores() + 1


_SET_OR_ADDRESS = re.compile(r"\{[^{}:]*,[^{}:]*\}|\bat 0x")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with a costly fixture come first: there, xdist gives all tests of a file to one worker, which makes it once.

    A name that shows a set or an address is refused: a set that is compiled and one that is read from a ``.pyc`` show
    another order, and workers of xdist that collect different names run nothing.
    """
    unstable = [item.nodeid for item in items if _SET_OR_ADDRESS.search(item.nodeid)]
    if unstable:
        raise pytest.UsageError(f"tests whose names differ from one process to the next; give them ids: {unstable}")
    items.sort(key=lambda item: item.get_closest_marker("costly_fixture") is None)


def pytest_collection_finish() -> None:
    """The leak check collects garbage; what the imports made need not be looked through every time."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    fork_server.stop()
    prepared_workers.stop()
    temporary.remove()


@pytest.fixture(scope="module", autouse=True)
def no_temporary_file_is_left() -> Iterator[None]:
    """Around every file of tests, for what its imports and its fixtures for several tests leave: :func:`nothing_is_left`
    finds it there already when it looks for the first time."""
    yield
    problems = temporary_leaks()
    temporary.clear()  # the next file is not to answer for it
    assert not problems, "left behind by this file: " + "; ".join(problems)


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
def fresh_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers in interpreters of their own, which have imported nothing: for tests about a worker's start or memory."""
    monkeypatch.setattr(process, "subprocess", subprocess)
    monkeypatch.setenv(prepared_workers.FRESH, "1")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run's directory that does not exist yet."""
    return tmp_path / "run"


@pytest.fixture
def no_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that cannot exchange two names: an old kernel, NFS."""
    monkeypatch.setattr(files, "exchange", lambda first, second: False)


@pytest.fixture
def faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Faults:
    """Named points where this test makes things go wrong; arm them before the workers start."""
    return Faults(tmp_path / "faults", monkeypatch)
