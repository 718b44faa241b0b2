"""One worker's part of a save: from the slab to synced files.

Reading order: ``save_spec.py``, ``write_task.py``, ``part_writer.py``, ``write_back.py``, ``direct_io.py``;
``hard_link_base.py`` for incremental saves.
"""
