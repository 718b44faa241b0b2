"""Every storage: a file system, real object stores, and one before which requests fail."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from stager.workers.checkpoint.storage.places import storage_of
from tests.object_stores.conftest import far_url, proxy, run_url_of, servers  # noqa: F401  # fixtures
from tests.object_stores.proxy import Fault, Proxy
from tests.object_stores.servers import Servers


@pytest.fixture(params=["file system", "ministack", pytest.param("moto", marks=pytest.mark.long), "faulty"])
def directory(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    servers: Servers,  # noqa: F811  # as pytest gives it
) -> Iterator[str]:
    """The directory of a run, prepared. ``faulty``: of each kind of request, some fail, and the client repeats them."""
    if request.param == "file system":
        found = str(tmp_path / "run")
    elif request.param == "faulty":
        far: Proxy = request.getfixturevalue("proxy")
        for method in ("GET", "PUT", "HEAD", "POST"):
            for after, what in ((1, 503), (3, Fault.RESET), (6, Fault.LOSE_ANSWER)):
                far.when(method, "", what, after=after)
        found = request.getfixturevalue("far_url")
    else:
        found = request.getfixturevalue("run_url_of")(servers.of(request.param))
    storage_of(found).prepare(found)
    yield found
