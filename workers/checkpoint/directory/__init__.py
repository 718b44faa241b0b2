"""The run directory: names, files that are written once, manifest, receipts, locks.

Reading order: ``run_directory.py``, ``files.py``, ``envelope.py``, ``manifest.py``, ``receipt.py``, ``read_lock.py``,
``protected.py``.
"""
