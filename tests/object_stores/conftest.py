"""Servers, one of each kind for a process that runs tests, and a run of its own for each test."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from itertools import count

import pytest

from stager.workers.checkpoint.storage.objects.client import client_of
from tests.object_stores.proxy import Proxy, proxied
from tests.object_stores.servers import BUCKET, Server, Servers, environment

_numbers = count(1)


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """One server of each kind, when somebody asks for it."""
    with Servers(lambda kind: tmp_path_factory.mktemp(kind, numbered=True)) as found:
        # The client's threads and what they poll with are there from the first request on, for the life of the process.
        with pytest.MonkeyPatch.context() as patch:
            _use(found.of("ministack").url, patch)
            client_of(f"s3://{BUCKET}").exists("warm")
            client_of.cache_clear()
        yield found


@pytest.fixture(params=["ministack", pytest.param("moto", marks=pytest.mark.long)])
def server(request: pytest.FixtureRequest, servers: Servers) -> Server:
    """A server of each kind in turn; the short suite has one."""
    return servers.of(request.param)


@pytest.fixture
def run_url_of(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[Server], str]]:
    """Gives the URL of a run that does not exist yet. Every client of this test, and of its processes, finds the server."""

    def url_of(server: Server) -> str:
        _use(server.url, monkeypatch)
        return f"s3://{BUCKET}/runs/{next(_numbers)}"

    yield url_of
    _forget(caplog)


@pytest.fixture
def run_url(server: Server, run_url_of: Callable[[Server], str]) -> str:
    """The URL of a run that does not exist yet, in each server in turn."""
    return run_url_of(server)


@pytest.fixture
def proxy(servers: Servers, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[Proxy]:
    """A proxy before one of the servers, which every client of this test uses."""
    with proxied(servers.of("ministack").port) as proxy:
        _use(proxy.url, monkeypatch)
        yield proxy
        _forget(caplog)


@pytest.fixture
def far_url(proxy: Proxy) -> str:
    """The URL of a run behind the proxy."""
    return f"s3://{BUCKET}/runs/{next(_numbers)}"


def _use(url: str, patch: pytest.MonkeyPatch) -> None:
    for name, value in environment(url).items():
        patch.setenv(name, value)
    client_of.cache_clear()


def _forget(caplog: pytest.LogCaptureFixture) -> None:
    """Let go of the client and its connections. An error in a record of the log may hold it."""
    caplog.clear()
    client_of.cache_clear()
    gc.collect()
