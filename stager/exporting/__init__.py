"""A committed checkpoint as one file for other programs: ``stager export``.

Reading order: ``export.py`` (the whole story), ``source.py`` (tensors of the checkpoint, whole or in chunks), ``stream.py``
(their bytes, checked), ``output.py`` (the file).
"""
