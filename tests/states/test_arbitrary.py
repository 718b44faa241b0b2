"""A few of the arbitrary states; ``python -m tests.states.arbitrary`` runs thousands."""

from __future__ import annotations

import pytest

from tests.states.arbitrary import run


@pytest.mark.parametrize("file_format", ["dcp", "torch", "safetensors"])
def test_arbitrary_states_are_loaded_as_torch_loads_them(file_format: str) -> None:
    run(file_format, 25, 1)
