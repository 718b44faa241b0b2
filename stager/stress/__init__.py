"""`stager stress`: training loops in child processes, faults in all of their processes, and a check after each run.

Start at ``run.py``. ``drawing.py`` draws an episode, ``conductor.py`` plays it, ``checker.py`` checks what is on the disk,
and ``judge.py`` judges what was seen.
"""

from stager.stress.config import StressConfig as StressConfig
from stager.stress.run import StressOptions as StressOptions
from stager.stress.run import run_stress as run_stress

__all__ = ["StressConfig", "StressOptions", "run_stress"]
