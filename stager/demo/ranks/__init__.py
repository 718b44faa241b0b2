"""The demo on several ranks: killed as a whole, killed in part, resumed on more and on fewer ranks.

``torchrun --nproc-per-node 2 -m stager demo`` runs it.  Reading order: ``training.py`` (one rank's part),
``run.py`` (what each rank that torchrun started does), ``story.py`` (the acts), ``job.py`` (the jobs that rank 0 starts
and kills), ``checks.py`` (what must be shown).
"""

from stager.demo.ranks.config import RanksConfig, RanksSettings
from stager.demo.ranks.run import run_ranks_demo

__all__ = ["RanksConfig", "RanksSettings", "run_ranks_demo"]
