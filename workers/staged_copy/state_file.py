"""A state dict as one file, whole or not at all."""

from __future__ import annotations

import os
from typing import Any

import torch

from stager.workers.checkpoint.storage.posix.files import remove, storage_errors, sync_directory
from stager.workers.faults import point


def write_state_file(state: Any, path: str) -> None:
    """Write what ``torch.save`` writes, to a temporary file that then replaces ``path``; return when it is durable.

    torch's ``_ReplicationStager._persist_state_dict`` writes the same file, and does not sync the directory.

    Raises:
        StorageError: the file system failed. What was at ``path`` before is there still.
    """
    temporary = f"{path}.tmp"
    with storage_errors("write the state dict", path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                torch.save(state, file)
                file.flush()
                point("persist.written")
                os.fsync(file.fileno())
            point("persist.synced")
            os.replace(temporary, path)
        except BaseException:
            remove(temporary)
            raise
        point("persist.renamed")
        sync_directory(os.path.dirname(path))
