"""The deep copy of a state dict, made and written by worker processes for a ``WorkerStager``.

Reading order: ``share.py`` (one worker's share of the copy), ``state_file.py``, ``persisting.py``.
"""
