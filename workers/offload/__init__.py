"""Deep copy of any object with its tensors' storages staged elsewhere: the one engine, for trainer and workers.

Reading order: ``copier.py``, ``tensors.py``, ``hook_memo.py``, ``key_path.py``; then a state dict on its way to another
process, ``packed_state.py`` and ``parts.py``.
"""
