"""DCP warns that there is no process group whenever there is none."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid.startswith("tests/storage/"):
            item.add_marker(pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"))
