from __future__ import annotations

from tests.cli.conftest import plain_environment, run, saved_run

__all__ = ["plain_environment", "run", "saved_run"]
