"""Where stager runs: Linux, with ``/proc``. Elsewhere its import says so in one sentence. Imports nothing of ours."""

from __future__ import annotations

import os

_NAMES = {"darwin": "macOS", "win32": "Windows", "cygwin": "Cygwin"}


def check_platform(platform: str, proc: str = "/proc") -> None:
    """Raise ImportError where stager cannot work.

    Args:
        platform: ``sys.platform``.
        proc: where the kernel shows processes.
    """
    if platform != "linux":
        raise ImportError(
            f"stager needs Linux (memfd, flock, /proc), and this is {_NAMES.get(platform, platform)}; run it on a Linux "
            "host, in a container or in WSL 2. Its checkpoints can be read here without it, by torch.distributed.checkpoint"
        )
    if not os.path.isdir(os.path.join(proc, "self")):
        raise ImportError(
            f"stager needs {proc}, and it is not mounted here; mount it (mount -t proc proc {proc}), or start the container "
            "or chroot with it"
        )
