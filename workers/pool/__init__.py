"""Worker processes for any callable: spawned, watched, replaced, reaped.

Reading order: ``pool.py`` (diagram), ``messages.py``, ``channel.py``, ``worker_main.py``, ``worker_loop.py``, ``roster.py``,
``supervisor.py``, ``heartbeat.py``. Nothing here knows what a checkpoint is.
"""
