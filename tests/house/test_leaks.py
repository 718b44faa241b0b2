"""The check that every test leaves nothing in the temporary directory finds what is left there, in a suite of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests import temporary

ROOT = Path(__file__).parents[2]

SUITE = """
import os, subprocess, sys, tempfile
import pytest
from tests import leaks

leaks._PATIENCE_SECS = 0.0  # nothing here goes away by itself


@pytest.fixture(scope="module")
def careless():
    os.mkdir(os.path.join(tempfile.gettempdir(), "of-the-fixture"))


def test_tidy(tmp_path):
    (tmp_path / "mine").touch()
    with tempfile.NamedTemporaryFile(), tempfile.TemporaryDirectory():
        pass


def test_file():
    os.close(tempfile.mkstemp(prefix="of-the-test")[0])


def test_child():
    subprocess.run([sys.executable, "-c", "import tempfile; tempfile.mkdtemp(prefix='of-the-child')"], check=True)


def test_fixture(careless):
    print("in", tempfile.gettempdir())
"""


@pytest.mark.parametrize("processes", ["0", "1"])
def test_temporary_file_that_is_left_fails_the_test_that_left_it(tmp_path: Path, processes: str) -> None:
    (tmp_path / "test_careless.py").write_text(SUITE)
    done = _pytest(tmp_path, "-n", processes)
    errors = [line for line in done.stdout.splitlines() if line.startswith("ERROR ")]
    assert "4 passed, 3 errors" in done.stdout, done.stdout + done.stderr
    assert sorted(line.split("::")[1].split(" ")[0] for line in errors) == ["test_child", "test_file", "test_fixture"]
    for left in ("of-the-test", "of-the-child", "of-the-fixture"):
        assert f"temporary file {left}" in done.stdout
    assert temporary.entries() == frozenset()  # theirs was in ours, and went with them


def _pytest(directory: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """The suite of ``directory`` with our ``conftest.py``."""
    settings = ["-p", "tests.conftest", "-c", os.devnull, "--rootdir", str(directory), "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "-rE", *settings, "--basetemp", str(directory / "base"), *options]
    return subprocess.run(
        [*command, str(directory)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_temporary_directory_is_this_process_s_own() -> None:
    assert tempfile.gettempdir() == os.environ["TMPDIR"] == temporary.DIRECTORY
    assert len(temporary.DIRECTORY) < 50  # an address of a socket has 107 bytes at most
