"""``staging.location``: sources in shared memory, which workers copy.

Reading order: ``movable.py`` (what may be moved there), ``sharer.py``, ``worker_copy.py``.
"""
