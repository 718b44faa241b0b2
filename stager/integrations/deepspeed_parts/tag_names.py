"""Which names a tag may have."""

from __future__ import annotations

import os

from stager.integrations.deepspeed_parts.area import AREA
from stager.workers.errors import ArgumentError

LATEST = "latest"
LATEST_UNIVERSAL = "latest_universal"


def check_tag(save_dir: str, tag: str) -> None:
    """Refuse a tag whose directory would stand where something else is to be.

    Args:
        save_dir: absolute.

    Raises:
        ArgumentError: says why, and what to do.
    """
    final = os.path.abspath(os.path.join(save_dir, tag))
    if os.path.isabs(tag) or is_in(save_dir, final):
        raise ArgumentError(f"tag is {tag!r}, which is no directory in {save_dir}; give a name, such as 'step-100'")
    first = os.path.relpath(final, save_dir).split(os.sep)[0]
    if first in (LATEST, LATEST_UNIVERSAL):
        raise ArgumentError(
            f"tag is {tag!r}, and {os.path.join(save_dir, first)} is the file that names the newest tag; give another tag"
        )
    if first == AREA:
        raise ArgumentError(
            f"tag is {tag!r}, and stager writes in {os.path.join(save_dir, AREA)} what has no name yet; give another tag"
        )
    if os.path.lexists(final) and not os.path.isdir(final):
        raise ArgumentError(f"tag is {tag!r}, and {final} is no directory; move it away, or give another tag")


def is_in(path: str, directory: str) -> bool:
    """Tell whether a path is a directory, or is in it."""
    found, at = os.path.abspath(path), os.path.abspath(directory)
    return found == at or found.startswith(at.rstrip(os.sep) + os.sep)
