"""What a state consists of, and the plan to store it.

Reading order: ``flatten.py`` (the state tree: leaves and structure), ``per_rank.py``, ``shards.py`` and ``dtensors.py``
(leaves that differ between ranks), ``fingerprint.py`` (what a cached plan depends on), ``placement.py`` (where each
tensor's bytes go in the slab), ``grouping.py`` (which tensors share a file), ``snapshot_plan.py`` (the plan).
"""
