"""One save, from the state to the Futures.

Reading order: ``save.py`` (its record, what users see of it, and errors that nobody has read), ``saver.py`` (one save in
order), ``staging_thread.py``, ``hand_over.py`` (pieces to the workers), ``completion.py`` (from their results to the
Futures). What makes them: ``setup.py``. What ends them: ``ending.py``, ``preemption.py``, ``at_exit.py``, ``open_here.py``.
What comes after a commit: ``retainer.py``.
"""
