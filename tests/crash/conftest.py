from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.crash.nursery import Nursery


@pytest.fixture(scope="package")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    """Where the trainers of these tests are forked; it is there before and after each of them."""
    with Nursery(tmp_path_factory.mktemp("trainers")) as shared:
        yield shared
