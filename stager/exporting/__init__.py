"""A committed checkpoint as one file for other programs: ``stager export``.

Reading order: ``export.py`` (the whole story), ``source.py`` (the checkpoint), ``output.py`` (the file).
"""
