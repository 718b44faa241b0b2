"""Host memory that trainer and workers share.

``slab.py`` creates, ``attached.py`` attaches, ``shared_source.py`` is the user's own storage in shared memory; ``pages.py``
allocates pages and gives them back. One process creates a mapping and frees it; who may write to it, and when, stands at the
head of each file. ``workers/device/host_memory.py`` registers it with a device.
"""
