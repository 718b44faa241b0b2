from __future__ import annotations

import pytest

from tests import fork_server
from tests.crash.nursery import Nursery


@pytest.fixture(scope="package")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Nursery:
    """Where the trainers of these tests are forked."""
    return Nursery(fork_server.shared(), tmp_path_factory.mktemp("trainers"))
