"""What a state consists of, and the plan to store it.

Reading order: ``state_tree.py`` (leaves and structure), ``flatten.py`` (makes it of what users give), ``containers.py``,
``stateful.py``, ``per_rank.py``, ``rng_state.py`` and ``tensor_kinds.py`` (values that are more than their bytes),
``shards.py`` and ``dtensors.py`` (leaves that lie on several ranks), ``optimizer_states.py`` (what an optimizer will have),
``fingerprint.py`` (what a cached plan depends on), ``tensor_table.py`` and ``copies.py`` (what a plan is made from, and
says), ``placement.py`` (where each tensor's bytes go in the slab), ``grouping.py`` (which tensors share a file),
``snapshot_plan.py`` (the plan).
"""
