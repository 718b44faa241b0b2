"""The shared host memory of snapshots in flight.

Reading order: ``buffer.py`` (a slab's states, and the lease), ``slabs.py`` (what there is), ``arena.py``, ``prefault.py``.
"""
