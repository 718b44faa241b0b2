"""A committed checkpoint as one file for other programs: ``stager export``.

Reading order: ``export.py`` (the whole story), ``source.py`` (the checkpoint), ``whole.py`` (containers with
recipes), ``output.py`` (the file).
"""
