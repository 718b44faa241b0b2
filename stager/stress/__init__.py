"""`stager stress`: training loops in child processes, faults in all of them, and a check of what is left after each.

Start at ``run.py``; an episode is drawn by ``drawing.py``, played by ``conductor.py``, and judged by ``checker.py`` (what is
on disk) and ``judge.py`` (what was seen).
"""

from stager.stress.config import StressConfig as StressConfig
from stager.stress.run import StressOptions as StressOptions
from stager.stress.run import run_stress as run_stress

__all__ = ["StressConfig", "StressOptions", "run_stress"]
