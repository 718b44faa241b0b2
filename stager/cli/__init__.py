"""The command line: one file for each command, ``app.py`` puts them together.

Nothing here imports torch at module level, so that ``stager --help`` and a wrong option answer at once.
"""

from stager.cli.app import app, main

__all__ = ["app", "main"]
