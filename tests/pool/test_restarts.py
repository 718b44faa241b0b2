from __future__ import annotations

import pytest

from stager.workers.pool.restart_budget import RestartBudget


def test_first_death_is_replaced_at_once_and_the_next_ones_later_and_later() -> None:
    restarts = RestartBudget(max_failed_starts=8)
    delays = []
    for incident in range(12):
        now = 100.0 * incident
        restarts.worker_died(started=now - 1, now=now)
        delays.append(max(0.0, restarts.next_start - now))
    assert delays[:4] == pytest.approx([0.0, 0.1, 0.2, 0.4])
    assert delays[-1] == 10.0
    assert delays == sorted(delays)


def test_workers_that_die_together_are_one_incident() -> None:
    restarts = RestartBudget(max_failed_starts=0)
    for number in range(16):
        restarts.worker_died(started=1.0 + number / 100, now=2.0 + number / 100)
    assert restarts.next_start < 2.0


def test_a_finished_task_restores_the_restart_budget() -> None:
    restarts = RestartBudget(max_failed_starts=8)
    for now in (10.0, 20.0, 30.0):
        restarts.worker_died(now - 1, now)
    before = restarts.next_start
    restarts.task_done()
    restarts.worker_died(39.0, 40.0)
    assert restarts.next_start == before


def test_broken_after_more_failed_starts_in_a_row_than_allowed() -> None:
    restarts = RestartBudget(max_failed_starts=1)
    restarts.start_failed(started=0.0, now=1.0)
    restarts.start_failed(started=0.5, now=1.1)  # the same incident
    assert not restarts.broken
    restarts.start_failed(started=2.0, now=3.0)
    assert restarts.broken
    restarts.worker_ready()
    assert not restarts.broken
