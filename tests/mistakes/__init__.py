"""The page of mistakes (``docs/mistakes.md``): each is made, and the page shows what stager says to it.

    python -m tests.mistakes

writes the page. Reading order: ``mistake.py``, ``topics/`` (the table: a file for each part of the page), ``home.py`` (where
mistakes are made), ``outcome.py`` (what is said), ``page.py``.
"""
