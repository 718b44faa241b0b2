"""The head of a manifest in an object store."""

from __future__ import annotations

from stager.workers.checkpoint.documents.head import HEAD_BYTES, Head, parse_head
from stager.workers.checkpoint.storage.objects.client import Client
from stager.workers.checkpoint.storage.objects.keys import Place


def head_of(client: Client, place: Place) -> Head | None:
    """Return the head of a checkpoint's manifest; None: there is none, or it is no manifest."""
    try:
        return parse_head(client.get_start(place.manifest, HEAD_BYTES))
    except FileNotFoundError:
        return None
