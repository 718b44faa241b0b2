"""One worker's part of a save: from the slab to synced files.

Reading order: ``save_spec.py``, ``write_task.py``, ``part_writer.py``, ``small_items.py``, ``direct_io.py``,
``write_back.py``; ``hard_link_base.py`` and ``unchanged_files.py`` for incremental saves.
"""
