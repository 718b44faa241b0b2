"""The demo: a small GPT is trained, killed in the middle of a save and resumed, on one rank or several.

``stager demo`` runs it.  Reading order: ``train.py`` (the loop to copy), ``sharded.py`` (the same on several ranks),
``text.py`` (batches that resume exactly), ``story.py`` (the acts), ``leg.py`` and ``runner.py`` (when to kill),
``job.py`` (the processes), ``measure.py`` (what a save costs), ``checks.py`` (what must be shown).
"""

from stager.demo.config import DemoConfig, DemoSettings, RanksConfig
from stager.demo.run import run_demo

__all__ = ["DemoConfig", "DemoSettings", "RanksConfig", "run_demo"]
