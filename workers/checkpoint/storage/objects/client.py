"""The connection to an object store, through obstore.

Credentials, region and endpoint are found as the client finds them: ``AWS_ACCESS_KEY_ID``, ``AWS_REGION``,
``AWS_ENDPOINT_URL``, ``GOOGLE_APPLICATION_CREDENTIALS``, ``AZURE_STORAGE_ACCOUNT_NAME`` and so on, or the machine's role.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NoReturn

from stager.workers.checkpoint.storage.paths import OBJECT_STORE_URL
from stager.workers.errors import ConfigError, StorageError

if TYPE_CHECKING:
    from obstore.store import ObjectStore

# A request that gets no answer is repeated for so long. A server that is restarted must not fail a save.
RETRY_SECS = 600.0
RETRY_VARIABLE = "STAGER_OBJECT_STORE_RETRY_SECS"  # workers inherit it
_BACKOFF: Any = {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=15), "base": 2}
_FIRST_SECS = 10.0  # for the first request of a program


@dataclass(frozen=True, slots=True)
class Version:
    """An object's content, and what a later write can be conditional on."""

    data: bytes
    version: Any


@dataclass(frozen=True, slots=True)
class Listed:
    """An object in a list: its key, its size, when it was written (unix time), and what changes with its content."""

    key: str
    nbytes: int
    modified: float
    etag: str


class Client:
    """One bucket. Keys have no leading slash.

    Attributes:
        server: the endpoint that the environment names; "": the service's own.
        is_conditional: the store is known to refuse a write whose condition does not hold.

    Raises, in every method:
        FileNotFoundError: there is no such object.
        StorageError: the store refuses, or does not answer.
    """

    def __init__(self, root: str) -> None:
        obstore = _import()
        self._root = root
        self._obstore: Any = obstore
        self._store = _connect(root, _retry_secs())
        self._has_answered = False
        self.is_conditional = False
        self.server = _endpoint()

    def check(self) -> None:
        """Make sure that the store answers and has the bucket, once. Has little patience: most often a name is wrong.

        Raises:
            StorageError
        """
        if self._has_answered:
            return
        try:
            with self._errors("reach", ""):
                self._obstore.list_with_delimiter(_connect(self._root, _FIRST_SECS), "stager")
        except FileNotFoundError as error:
            raise StorageError(
                errno.ENOENT, "there is no such bucket; create it, or correct the name", self._root
            ) from error
        self._has_answered = True

    def trust(self) -> None:
        """Take it that the store has answered this program: a worker's trainer has made sure of it."""
        self._has_answered = True

    def url(self, key: str) -> str:
        """Return the URL of an object."""
        return f"{self._root}/{key}"

    def get(self, key: str) -> bytes:
        """Return an object's bytes."""
        return self.get_version(key).data

    def get_version(self, key: str) -> Version:
        """Return an object, with what a conditional write needs."""
        with self._errors("read", key):
            result = self._obstore.get(self._store, key)
            meta = result.meta
            return Version(bytes(result.bytes()), _version(meta))

    def get_start(self, key: str, nbytes: int) -> bytes:
        """Return the first bytes of an object, all of it if it has fewer."""
        return bytes(self.get_range(key, 0, nbytes))

    def get_range(self, key: str, start: int, nbytes: int) -> memoryview:
        """Return bytes of an object; fewer if it ends before."""
        with self._errors("read", key):
            return memoryview(self._obstore.get_range(self._store, key, start=start, length=nbytes))

    def exists(self, key: str) -> bool:
        """Return whether there is such an object."""
        try:
            self.head(key)
        except FileNotFoundError:
            return False
        return True

    def head(self, key: str) -> Listed:
        """Return the facts of an object."""
        with self._errors("look at", key):
            return _listed(self._obstore.head(self._store, key))

    def put(self, key: str, data: bytes | memoryview | Sequence[bytes | memoryview]) -> None:
        """Write an object, as a whole or not at all; from the memory that is given, without a copy of it."""
        with self._errors("write", key):
            self._obstore.put(self._store, key, data, use_multipart=False)

    def create(self, key: str, data: bytes) -> bool:
        """Write an object if there is none of this key. Returns whether it did."""
        with self._errors("write", key):
            try:
                self._obstore.put(self._store, key, data, mode="create", use_multipart=False)
            except self._obstore.exceptions.AlreadyExistsError:
                return False
            return True

    def replace(self, key: str, data: bytes, version: Any) -> bool:
        """Write an object if it is still the one that was read. Returns whether it did."""
        with self._errors("write", key):
            try:
                self._obstore.put(self._store, key, data, mode=version, use_multipart=False)
            except (self._obstore.exceptions.PreconditionError, FileNotFoundError):
                return False
            return True

    def delete(self, keys: Sequence[str]) -> None:
        """Delete objects; what is not there is passed over."""
        if keys:
            with self._errors("remove", keys[0]):
                try:
                    self._obstore.delete(self._store, list(keys))
                except FileNotFoundError:  # where the store tells, each for itself
                    for key in keys:
                        self._delete_one(key)

    def _delete_one(self, key: str) -> None:
        try:
            self._obstore.delete(self._store, key)
        except FileNotFoundError:
            return

    def walk(self, prefix: str) -> Iterator[Listed]:
        """Iterate over all objects under a prefix. One request tells of a thousand."""
        with self._errors("list", prefix):
            for batch in self._obstore.list(self._store, prefix):
                yield from map(_listed, batch)

    def list_directory(self, prefix: str) -> tuple[list[str], list[Listed]]:
        """Return what is directly under a prefix: the names of further prefixes, and objects."""
        with self._errors("list", prefix):
            found = self._obstore.list_with_delimiter(self._store, prefix or None)
            return [name.rpartition("/")[2] for name in found["common_prefixes"]], list(map(_listed, found["objects"]))

    @contextmanager
    def _errors(self, action: str, key: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, "no such object", self.url(key)) from error
        except self._obstore.exceptions.BaseError as error:
            self._refuse(action, key, error)

    def _refuse(self, action: str, key: str, error: Exception) -> NoReturn:
        exceptions = self._obstore.exceptions
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError):
            code, advice = errno.EACCES, "check the credentials, and what they allow on this bucket"
        else:
            code, advice = errno.EIO, "check that the store can be reached and the bucket exists"
        raise StorageError(code, f"cannot {action}: {first}; {advice}", self.url(key)) from error


def _version(meta: Any) -> Any:
    return {key: meta[key] for key in ("e_tag", "version") if meta.get(key) is not None}


def _listed(meta: Any) -> Listed:
    return Listed(meta["path"], meta["size"], meta["last_modified"].timestamp(), meta.get("e_tag") or "")


def _connect(root: str, retry_secs: float) -> ObjectStore:
    from obstore.store import from_url

    endpoint = _endpoint()
    retries = {"max_retries": 1000, "retry_timeout": timedelta(seconds=retry_secs), "backoff": _BACKOFF}
    client = {"timeout": timedelta(seconds=min(300.0, retry_secs)), "connect_timeout": timedelta(seconds=5)}
    options: dict[str, Any] = {"client_options": client, "retry_config": retries}
    if root.startswith("s3://") and endpoint:
        options["endpoint"] = endpoint
        options["client_options"]["allow_http"] = endpoint.startswith("http://")
    try:
        return from_url(root, **options)
    except Exception as error:
        raise ConfigError(f"{root} cannot be used as an object store: {error}") from error


def _retry_secs() -> float:
    text = os.environ.get(RETRY_VARIABLE)
    try:
        secs = RETRY_SECS if text is None else float(text)
    except ValueError:
        secs = math.nan
    if not 0 < secs < math.inf:
        raise ConfigError(f"{RETRY_VARIABLE} is {text!r}; set it to a number of seconds above 0, or leave it out")
    return secs


def _endpoint() -> str:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""


def _import() -> Any:
    try:
        import obstore
        import obstore.exceptions
    except ImportError as error:
        raise ConfigError(
            "object stores are reached through obstore, which is not installed: pip install 'stager[object-store]'"
        ) from error
    return obstore


@lru_cache(maxsize=64)
def client_of(root: str) -> Client:
    """Return the connection to a bucket, ``s3://bucket``; one for each process."""
    return Client(root)


def split(url: str, *, is_known: bool = False) -> tuple[Client, str]:
    """Return the connection that a URL needs, and the key.

    Args:
        is_known: the store has answered, this process or another one.

    Raises:
        StorageError: the store does not answer, or has no such bucket.
    """
    match = OBJECT_STORE_URL.fullmatch(url)
    if match is None:
        raise ConfigError(f"{url} is not the URL of an object store")
    client = client_of(f"{match[1]}://{match[2]}")
    if is_known:
        client.trust()
    client.check()
    return client, (match[3] or "").strip("/")


os.register_at_fork(after_in_child=client_of.cache_clear)  # its threads are not in the child
