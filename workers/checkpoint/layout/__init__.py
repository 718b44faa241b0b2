"""Where every byte of a checkpoint comes from and goes to.

Reading order: ``structure.py``, ``layout.py``, ``layout_plan.py``, ``plan_cache.py``, ``layout_check.py``.
"""
