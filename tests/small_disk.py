"""A file system that is soon full."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk_at(mount: Path, nbytes: int) -> Iterator[Path]:
    """A tmpfs of so many bytes. Skips the test where none can be mounted."""
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "stager-test", str(mount)]
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount a small file system")
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("this container may not mount a file system")
    try:
        yield mount
    finally:
        subprocess.run(["umount", str(mount)], check=True)
