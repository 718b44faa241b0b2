"""The temporary directory of this test process: its own, so that whatever is found in it was left there by a test.

Made when this module is imported, which ``tests/conftest.py`` does before anything else. Processes that tests start inherit
it, and so do xdist's workers, whose directories are in their controller's.
"""

from __future__ import annotations

import os
import shutil
import tempfile

# Where pytest puts ``tmp_path`` is left as it was: it keeps the last three sessions' there, evidence of what failed.
os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
# A short name: addresses of sockets in it have 107 bytes at most.
DIRECTORY = tempfile.mkdtemp(prefix="st-")
os.environ["TMPDIR"] = tempfile.tempdir = DIRECTORY


# torch's cache of compiled code. The first optimizer of a process imports torch._dynamo, and that makes the directory: one
# for each user, not for each process, and meant to stay.
_KEPT = ("torchinductor_",)


def entries() -> frozenset[str]:
    """What is in the directory."""
    return frozenset(name for name in os.listdir(DIRECTORY) if not name.startswith(_KEPT))


def clear() -> None:
    """Remove what is in the directory, which has been reported."""
    for name in entries():
        path = os.path.join(DIRECTORY, name)
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            os.unlink(path)


def remove() -> None:
    """At the session's end."""
    shutil.rmtree(DIRECTORY, ignore_errors=True)  # an interrupted worker may be removing its own, in it, right now
