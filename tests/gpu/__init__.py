"""``python -m tests.gpu``, or ``make gpu``: everything that a machine with an accelerator is needed for, in one call.

1. ``__main__.py`` looks at the machine, runs ``tests/device`` and ``tests/gpu`` on it, then each measurement in a process of
   its own, all within a time that is given;
2. ``measure.py`` measures one way to save, on one state;
3. ``report.py`` writes ``device.json`` and ``device.md``.

With ``--dry`` all of it runs on the simulated accelerator of ``tests/accelerator``, small: its figures mean nothing.
"""
