"""Where every byte of a checkpoint comes from and goes to.

Reading order: ``structure.py``, ``tensor_node.py``, ``building.py``, ``items.py``, ``layout.py``, ``layout_plan.py``,
``layout_check.py``.
"""
