"""The tests of ``tests/device`` on the simulated accelerator, in each of its modes, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.accelerator import build

pytestmark = pytest.mark.costly_fixture  # the build

_ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session", autouse=True)
def built() -> None:
    """Build it once, before the modes run side by side."""
    try:
        build.build()
    except build.CannotBuildError as error:
        pytest.skip(str(error))


def run(mode: str) -> subprocess.CompletedProcess[str]:
    """Run the device tests in this mode."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/device"]
    few = {"STAGER_WORKERS__COUNT": "1", "STAGER_PERSISTENCE__FSYNC": "false"}  # what these tests show needs no more
    environment = {**os.environ, **few, "STAGER_SIMULATED": mode}
    return subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "mode",
    ["late", *(pytest.param(mode, marks=pytest.mark.long) for mode in ("ahead", "early", "behind"))],
)
def test_device_tests_pass(mode: str) -> None:
    ended = run(mode)
    assert ended.returncode == 0, ended.stdout[-8000:] + ended.stderr[-2000:]


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("first", range(0, 200, 20))
def test_device_tests_pass_with_any_seed(first: int) -> None:
    ended = run(f"seeds {first}-{first + 19}")
    assert ended.returncode == 0, ended.stdout[-8000:] + ended.stderr[-2000:]
