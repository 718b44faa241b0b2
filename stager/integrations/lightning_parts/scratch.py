"""Checkpoints that Lightning saves only for itself, loads a moment later, and removes.

    .lr_find_ID.ckpt, .scale_batch_size_ID.ckpt    of the ``Tuner`` and its callbacks: what to go back to
    .temp.ckpt                                     of ``ddp_spawn`` and its like: weights for the main process

Their names begin with a dot, which those of stager's checkpoints must not. They need to survive nothing, and the program
waits for them in any case.
"""

from __future__ import annotations

import os


def is_scratch(path: str | os.PathLike[str]) -> bool:
    """Tell whether Lightning saves to ``path`` only for itself."""
    return os.path.basename(os.fspath(path)).startswith(".")
