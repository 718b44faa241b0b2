"""The demo: a small GPT is trained, killed in the middle of a save and resumed, and nothing shows.

``stager demo`` runs it.  Reading order: ``train.py`` (the loop to copy), ``text.py`` and ``rng.py`` (what makes it
resume exactly), ``story.py`` (the six acts), ``measure.py`` (what a save costs), ``checks.py`` (what must be shown).
"""

from stager.demo.config import DemoConfig, DemoSettings
from stager.demo.story import run_demo

__all__ = ["DemoConfig", "DemoSettings", "run_demo"]
