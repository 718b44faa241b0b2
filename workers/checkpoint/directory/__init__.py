"""The run directory: names, files that are written once, manifest, receipts, locks.

What the file system refuses is a StorageError here, and what a file should not contain a CorruptCheckpointError.

Reading order: ``run_directory.py``, ``files.py``, ``envelope.py``, ``manifest.py``, ``receipt.py``, ``read_lock.py``,
``protected.py``, ``own_files.py``, ``lost_manifest.py`` (a checkpoint whose manifest somebody removed).
"""
