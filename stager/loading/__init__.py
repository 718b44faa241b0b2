"""From a committed checkpoint back to a state.

Reading order: ``loader.py`` (which one), ``match.py`` (what goes where), ``restore.py``, ``unpickle.py``, ``difference.py``.
"""
