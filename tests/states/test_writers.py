"""Programs that write behind the guard: nothing torn is committed, and the run goes on (``tests/states/writers.py``)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults import Faults
from tests.states.writers import WAYS, Way, run


@pytest.mark.parametrize("make", WAYS, ids=lambda make: make.__name__)
def test_torn_save_is_refused_by_name_and_later_ones_are_whole(
    make: Callable[[], Way], run_dir: Path, faults: Faults
) -> None:
    way = make()
    outcome = run(way, 3, run_dir, faults)
    assert not outcome.wrong
    assert outcome.failed == ([0] if way.tears else [])  # the first is held, so that all its tensors are torn
    for name in way.tears:
        assert name in outcome.messages[0]
    assert not any("quiet" in message for message in outcome.messages)
