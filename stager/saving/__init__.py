"""One save, from the state to the Futures.

Reading order: ``save.py`` and ``save_handle.py`` (its record, and what users see of it), ``saver.py`` (one save in order),
``staging_thread.py``, ``hand_over.py`` (pieces to the workers), ``completion.py`` (from their results to the Futures). What
makes them: ``setup.py``, ``options.py``. What ends them: ``ending.py``, ``preemption.py``, ``unread.py`` (errors that nobody
has read). What comes after a commit: ``retainer.py``.
"""
