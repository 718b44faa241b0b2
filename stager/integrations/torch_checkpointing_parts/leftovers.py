"""What a save that failed has left: removed when the same process begins the next save to that name.

torch_checkpointing removes nothing of it. It would be committed with the next save if that has fewer items.
"""

from __future__ import annotations

import os
from contextlib import suppress

from stager.integrations.torch_checkpointing_parts.receipt import marker_path, name_of_receipt, read_file_receipt
from stager.workers.checkpoint.storage.posix import files
from stager.workers.checkpoint.storage.posix.files import storage_errors


def begin(directory: str, writer: str) -> None:
    """Begin a save in a directory: remove the files that this process has written there before.

    A marker says that it has begun one. Without it, a thousand ranks would read each other's receipts in each save.

    Args:
        writer: of the receipts, see :class:`FileReceipt`.

    Raises:
        StorageError
    """
    with storage_errors("write", directory):
        try:
            os.close(os.open(marker_path(directory, writer), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        except FileExistsError:
            _remove_own(directory, writer)


def _remove_own(directory: str, writer: str) -> None:
    for receipt_name in os.listdir(directory):
        name = name_of_receipt(receipt_name)
        if name is None:
            continue
        receipt = read_file_receipt(os.path.join(directory, receipt_name))
        if receipt is None or receipt.writer != writer:
            continue
        path = os.path.join(directory, name)
        with suppress(FileNotFoundError):
            if receipt.is_of(os.stat(path)):  # if it is not, somebody else has written it since
                os.unlink(path)
        files.remove(os.path.join(directory, receipt_name))
