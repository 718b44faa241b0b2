"""One save, from the state to the Futures.

Reading order: ``save.py`` (its state and times), ``saver.py``, ``job.py`` (the message to the workers), ``answers.py``;
what ends it: ``ending.py``, ``preemption.py``; what comes after it: ``retainer.py``. ``telemetry.py`` is what is left to
read.
"""
