"""A fork server for all tests of one file: the seconds of its imports are spent once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from stager.state.rng_state import RngState
from stager.stress.run import Stage


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with Stage(tmp_path_factory.mktemp("stress")) as stage:
        yield stage


@pytest.fixture(autouse=True)
def global_generators_are_put_back() -> Iterator[None]:
    """Training seeds them."""
    rng = RngState()
    before = rng.state_dict()
    yield
    rng.load_state_dict(before)
