"""A committed checkpoint as one file for other programs: ``stager export``.

Reading order: ``export.py`` (the whole story), ``part.py`` (what of the checkpoint), ``source.py`` (the checkpoint),
``whole.py`` (containers with recipes), ``file_format.py`` and ``output.py`` (the file).
"""
