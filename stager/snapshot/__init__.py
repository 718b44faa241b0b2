"""From the state to bytes in a slab.

Reading order: ``flatten.py`` (leaves and structure), ``fingerprint.py`` (what a cached plan depends on), ``placement.py``
(where each tensor's bytes go), ``grouping.py`` (which of them share a file), ``plan.py``, ``batches.py`` and ``copying.py``
(how they get there), ``device.py`` (from a GPU), ``guard.py`` (what may be copied later), ``taker.py`` (all of it in order),
``pieces.py`` (in less memory).
"""
