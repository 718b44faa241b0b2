"""The devices that these tests use."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

SIMULATED = os.environ.get("STAGER_SIMULATED", "")
"""A mode of the simulated accelerator, such as ``late`` or ``seed 7``; empty: the accelerator that there is, if any."""

if SIMULATED:
    from tests.accelerator import device as simulated


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.accelerator.is_available():
        skip = pytest.mark.skip(reason="needs an accelerator; tests/accelerator runs it on a simulated one")
        for item in items:
            if "tests/device" in str(item.path):
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def mode() -> Iterator[None]:
    """Each test begins with its mode, and with its seed anew."""
    if SIMULATED:
        name, _, seed = SIMULATED.partition(" ")
        simulated.set_mode(name, int(seed or 0))
    yield
    torch.accelerator.synchronize()


@pytest.fixture
def device() -> torch.device:
    """The first device."""
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    return torch.device(kind.type, 0)


@pytest.fixture
def other_device(device: torch.device) -> torch.device:
    """The second device."""
    if torch.accelerator.device_count() < 2:
        pytest.skip("needs two devices")
    return torch.device(device.type, 1)


@pytest.fixture(params=["registered", "bounced"])
def reached(request: pytest.FixtureRequest, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> str:
    """How the device reaches the slabs: they are registered with it, or two pinned buffers stand between."""
    from stager.workers.device import host_memory

    if request.param == "bounced":
        monkeypatch.delitem(host_memory._registrars, device.type, raising=False)
    elif SIMULATED:
        monkeypatch.setitem(host_memory._registrars, device.type, simulated.HostMemory())
    return str(request.param)
