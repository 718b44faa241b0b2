"""One save, from the state to the Futures.

Reading order: ``setup.py`` (what it takes, from the configuration), ``save.py`` (its state and times), ``saver.py`` and its
``options.py``, ``job.py`` (the message to the workers), ``answers.py``, ``settler.py`` (from the answers to the Futures),
``unread.py`` (errors that nobody has looked at). What ends it: ``ending.py``, ``preemption.py``; what comes after it:
``retainer.py``. ``telemetry.py`` is what is left to read.
"""
