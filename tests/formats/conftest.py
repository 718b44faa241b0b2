from __future__ import annotations

from pathlib import Path

import pytest

from stager.workers.checkpoint.formats import FORMATS


@pytest.fixture(params=FORMATS)
def kind(request: pytest.FixtureRequest) -> str:
    """Every format there is: a new one is tested by being named in ``FORMATS``."""
    value: str = request.param
    return value


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A directory outside the sources, so that a process that starts there finds no stager."""
    path = tmp_path / "elsewhere"
    path.mkdir()
    return path
