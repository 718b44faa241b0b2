"""Real servers that speak S3, as processes of their own on a port of the loopback interface. They keep objects in memory."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.waiting import wait_until

BUCKET = "bucket"
# The servers check no signature; they tell S3 from other services by the service that it names.
_SIGNED = {
    "Authorization": "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
}


@dataclass(frozen=True)
class Server:
    """A server that answers, with an empty bucket."""

    kind: str
    port: int
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def open_uploads(self) -> int:
        """How many multipart uploads were begun and neither completed nor aborted."""
        return _request(f"{self.url}/{BUCKET}?uploads", "GET").count(b"<UploadId>")


class Servers:
    """One server of each kind, begun when it is asked for first, and ended together.

    Args:
        directory: returns one in which a server of a kind may write.
    """

    def __init__(self, directory: Callable[[str], Path]) -> None:
        self._directory = directory
        self._found: dict[str, Server] = {}
        self._running = ExitStack()

    def of(self, kind: str) -> Server:
        """Return the server of this kind."""
        if kind not in self._found:
            self._found[kind] = self._running.enter_context(serving(kind, self._directory(kind)))
        return self._found[kind]

    def __enter__(self) -> Servers:
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()


@contextmanager
def serving(kind: str, directory: Path) -> Iterator[Server]:
    """Run a server of this kind.

    Args:
        directory: in which it may write.
    """
    port = free_port()
    command, health = _COMMANDS[kind](port)
    log = directory / f"{kind}.log"
    with open(log, "wb") as output:
        own = {"GATEWAY_PORT": str(port), "TMPDIR": str(directory)}
        process = subprocess.Popen(
            command,
            cwd=directory,
            stdout=output,
            stderr=output,
            env={**os.environ, **own},
        )
    try:
        server = Server(kind, port, process)
        wait_until(lambda: process.poll() is not None or _answers(f"{server.url}{health}"))
        assert process.poll() is None, log.read_text()
        _request(f"{server.url}/{BUCKET}", "PUT")
        yield server
    finally:
        process.kill()
        process.wait()


def _ministack(port: int) -> tuple[list[str], str]:
    return [str(Path(sys.executable).with_name("ministack"))], "/_localstack/health"


def _moto(port: int) -> tuple[list[str], str]:
    return [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], "/moto-api/"


_COMMANDS = {"ministack": _ministack, "moto": _moto}


def free_port() -> int:
    """A port that nobody has at this moment."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def environment(url: str) -> dict[str, str]:
    """The variables by which clients find a server."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
    }


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def _request(url: str, method: str) -> bytes:
    with urllib.request.urlopen(urllib.request.Request(url, method=method, headers=_SIGNED), timeout=30) as answer:
        return bytes(answer.read())
