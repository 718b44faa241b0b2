"""The manifests in a tag: the hashes of each of its files, and what does not agree with them."""

from __future__ import annotations

import os
import re
from dataclasses import replace

from stager.integrations.deepspeed_parts.area import MANIFESTS, manifest_name
from stager.workers.checkpoint.documents.manifest import Manifest, parse_manifest
from stager.workers.checkpoint.layout.layout import FileSpec
from stager.workers.checkpoint.read.verify import check_files
from stager.workers.checkpoint.storage.posix import files
from stager.workers.errors import CorruptCheckpointError

_MANIFEST = re.compile(r"manifest-(.+)\.json")


def hashed_files(directory: str) -> list[str]:
    """Return the names of the files of a tag that have a manifest, whether they are there or not."""
    manifests = os.path.join(directory, MANIFESTS)
    found = map(_MANIFEST.fullmatch, sorted(os.listdir(manifests)) if os.path.isdir(manifests) else ())
    return [match[1] for match in found if match is not None]


def problems_of(directory: str, name: str, *, full: bool) -> list[str]:
    """Compare a file of a tag with its manifest. A file that has none has no problems."""
    path = os.path.join(directory, MANIFESTS, manifest_name(name))
    data = files.read_if_exists(path)
    if data is None:
        return []
    try:
        written = parse_manifest(data, path)
    except CorruptCheckpointError as error:
        return [str(error)]
    # The manifest calls the file as it was called when it was written.
    layout = replace(written.layout, files=(FileSpec(name, written.layout.files[0].nbytes),))
    manifest: Manifest = replace(written, layout=layout)
    return check_files(directory, manifest, full=full)
