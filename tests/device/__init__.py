"""Tests of what touches an accelerator.

They run on the accelerator that the process has: a real one, or the simulated one, on which
``tests/accelerator/test_modes.py`` runs them in every mode. Without any they are skipped.
"""
