"""Checks of the object store that checkpoints go to."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import suppress

from stager.config.sizes import format_bytes
from stager.doctor.finding import Finding, Status
from stager.workers.checkpoint.storage.objects.client import Client, split
from stager.workers.errors import StagerError, StorageError

_PROBE_BYTES = 32 << 20  # a stripe of a checkpoint


def check_store(url: str) -> Iterator[Finding]:
    """Reach a store, try its conditional writes, and write, read and remove an object of 32 MiB below the run's URL."""
    try:
        client, root = split(url)
    except StagerError as error:
        yield Finding("object store", "not reached", Status.FAIL, str(error), "correct what it names, and try again")
        return
    yield Finding("object store", client.server or url.partition(":")[0], Status.OK, "it answers, and has the bucket")
    key = f"{root}/.stager-doctor-{secrets.token_hex(8)}".lstrip("/")
    try:
        yield _check_conditions(client, key)
        yield _check_stripe(client, key)
    except (StorageError, FileNotFoundError) as error:
        advice = "allow these credentials to list, get, put and delete below this URL"
        yield Finding("write, read, remove", "refused", Status.FAIL, str(error), advice)
    finally:
        with suppress(StorageError):
            client.delete([key])


def _check_conditions(client: Client, key: str) -> Finding:
    client.put(key, b"1")
    stale = client.get_version(key)
    client.put(key, b"2")
    takes_all = client.create(key, b"3") or client.replace(key, b"4", stale.version)
    name = "conditional writes"
    if takes_all:
        meaning = "two runs could overwrite each other's checkpoints, so stager does not save here"
        return Finding(name, "ignored", Status.FAIL, meaning, "use a store that knows If-None-Match and If-Match")
    return Finding(name, "kept", Status.OK, "a checkpoint appears by one of them, and of two runs one wins")


def _check_stripe(client: Client, key: str) -> Finding:
    data = os.urandom(_PROBE_BYTES)
    started = time.monotonic()
    client.put(key, data)
    put_secs = time.monotonic() - started
    started = time.monotonic()
    is_same = client.get(key) == data
    get_secs = time.monotonic() - started
    name = "write, read, remove"
    if not is_same:
        return Finding(
            name, "differs", Status.FAIL, "it returned other bytes than it was given", "do not use this store"
        )
    rates = f"{_PROBE_BYTES / put_secs / 1e6:.0f} MB/s and {_PROBE_BYTES / get_secs / 1e6:.0f} MB/s"
    value = f"{rates} for {format_bytes(_PROBE_BYTES)}, one request each"
    return Finding(name, value, Status.OK, "each worker has eight such requests on the way at once")
