"""One save, from the state to the Futures.

Reading order: ``open_run.py`` (what it takes to save; its parts are made by ``setup.py``), ``save.py`` (a save's record, and
what users see of it), ``saver.py`` (one save in order), ``snapshot_stager.py`` (its pieces into slabs), ``staging.py``
(which of them are where), ``staging_thread.py``, ``hand_over.py`` (pieces to the workers), ``completion.py`` (from their
results to the Futures), ``save_errors.py`` (what a failed save means). What ends them: ``ending.py``, ``preemption.py``,
``at_exit.py``, ``open_here.py``. What comes after a commit: ``retainer.py``. What those see who wait: ``progress.py``.
"""
