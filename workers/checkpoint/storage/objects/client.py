"""The connection to an object store, through obstore.

Credentials, region and endpoint are found as the client finds them: ``AWS_ACCESS_KEY_ID``, ``AWS_REGION``,
``AWS_ENDPOINT_URL``, ``GOOGLE_APPLICATION_CREDENTIALS``, ``AZURE_STORAGE_ACCOUNT_NAME`` and so on, or the machine's role.
"""

from __future__ import annotations

import errno
import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from stager.workers.checkpoint.storage.objects.refusal import first_line, refusal
from stager.workers.checkpoint.storage.paths import OBJECT_STORE_URL
from stager.workers.errors import ConfigError, StorageError, UsageError

if TYPE_CHECKING:
    from obstore.store import ObjectStore

logger = logging.getLogger("stager")

# A request that gets no answer is repeated for so long. A server that is restarted must not fail a save.
RETRY_SECS = 600.0
RETRY_VARIABLE = "STAGER_OBJECT_STORE_RETRY_SECS"  # workers inherit it
_BACKOFF: Any = {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=15), "base": 2}
_REQUEST_SECS = 300.0
_FIRST_SECS = 10.0  # for the first request of a program, and for those after one that got no answer


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
        self._patient = _connect(root, _retry_secs(), min(_REQUEST_SECS, _retry_secs()))
        self._is_away = False
        self._has_answered = False
        self.is_conditional = False
        self.server = _endpoint()

    @property
    def _store(self) -> ObjectStore:
        """The connection. While the store is away, each further request has little patience, so that an end comes soon."""
        return self._impatient if self._is_away else self._patient

    @cached_property
    def _impatient(self) -> ObjectStore:
        return _connect(self._root, min(_FIRST_SECS, _retry_secs()), _REQUEST_SECS)

    def check(self, key: str) -> None:
        """Make sure that the store answers and has the bucket, once. Has little patience: most often a name is wrong.

        Args:
            key: below which this program may list.

        Raises:
            StorageError
        """
        if self._has_answered:
            return
        try:
            with self._errors("reach", key):
                self._obstore.list_with_delimiter(_connect(self._root, _FIRST_SECS, _FIRST_SECS), key or None)
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
        exceptions = self._obstore.exceptions
        try:
            yield
            self._is_away = False
        except FileNotFoundError as error:
            self._is_away = False
            raise FileNotFoundError(errno.ENOENT, "no such object", self.url(key)) from error
        except exceptions.BaseError as error:
            is_denied = isinstance(error, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError)
            found = refusal(action, self.url(key), self.server, error, is_denied=is_denied)
            self._is_away = found.errno == errno.EIO
            logger.debug("%s", error)
            raise found from None  # the client's error is a dump of many lines


def _version(meta: Any) -> Any:
    return {key: meta[key] for key in ("e_tag", "version") if meta.get(key) is not None}


def _listed(meta: Any) -> Listed:
    return Listed(meta["path"], meta["size"], meta["last_modified"].timestamp(), meta.get("e_tag") or "")


def _connect(root: str, retry_secs: float, request_secs: float) -> ObjectStore:
    from obstore.store import from_url

    endpoint = _endpoint()
    retries = {"max_retries": 1000, "retry_timeout": timedelta(seconds=retry_secs), "backoff": _BACKOFF}
    client = {"timeout": timedelta(seconds=request_secs), "connect_timeout": timedelta(seconds=5)}
    options: dict[str, Any] = {"client_options": client, "retry_config": retries}
    if root.startswith("s3://") and endpoint:
        if not endpoint.startswith(("http://", "https://")):
            raise ConfigError(f"the endpoint of S3 is {endpoint!r} in the environment, and lacks http:// or https://")
        options["endpoint"] = endpoint
        options["client_options"]["allow_http"] = endpoint.startswith("http://")
    try:
        return from_url(root, **options)
    except Exception as error:  # noqa: BLE001  # of several classes; each means that a setting is missing or wrong
        raise ConfigError(
            f"{root} cannot be used as an object store: {first_line(error)}; set what is missing in the environment"
        ) from None


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
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
    return next((os.environ[name] for name in names if os.environ.get(name)), "")


def _import() -> Any:
    try:
        import obstore
        import obstore.exceptions
    except ImportError as error:
        raise ConfigError(
            "object stores are reached through obstore, which is not installed: pip install obstore, or install stager with "
            "its extra object-store"
        ) from error
    return obstore


@lru_cache(maxsize=64)
def client_of(root: str) -> Client:
    """Return the connection to a bucket, ``s3://bucket``; one for each process."""
    return Client(root)


@cache
def _user() -> int:
    """Return the process that has used an object store first. A forked child remembers its parent's."""
    return os.getpid()


def _refuse_in_forked_child(url: str) -> None:
    """Raise UsageError in a child of a process that uses object stores: the client would hang there, then in the parent."""
    if _user() != os.getpid():
        raise UsageError(
            f"{url}: this process was forked from one that uses an object store, and the client works in no forked child; "
            'start it by "spawn" or "forkserver" (multiprocessing_context= of a DataLoader), or read in the parent'
        )


def split(url: str, *, is_known: bool = False) -> tuple[Client, str]:
    """Return the connection that a URL needs, and the key.

    Args:
        is_known: the store has answered, this process or another one.

    Raises:
        StorageError: the store does not answer, or has no such bucket.
        UsageError: this process was forked from one that uses object stores.
    """
    match = OBJECT_STORE_URL.fullmatch(url)
    if match is None:
        raise ConfigError(f"{url} is not the URL of an object store")
    _refuse_in_forked_child(url)
    client = client_of(f"{match[1]}://{match[2]}")
    if is_known:
        client.trust()
    key = (match[3] or "").strip("/")
    client.check(key)
    return client, key
