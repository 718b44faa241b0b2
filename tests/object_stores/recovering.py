"""A process that recovers a run, to be killed while it does. It imports nothing of the tests."""

from __future__ import annotations

from stager import recover


def recover_once(run_url: str) -> None:
    recover(run_url)
