"""The devices that these tests use."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

SIMULATED = os.environ.get("STAGER_SIMULATED", "")
"""Modes of the simulated accelerator, with commas between: ``late``, ``early,seed 7``, ``seeds 0-199``. Empty: use the
accelerator that there is, if any."""


def modes() -> list[str]:
    """Each test runs once in each of these."""
    found: list[str] = []
    for name in SIMULATED.split(",") if SIMULATED else ["real"]:
        first, _, last = name.removeprefix("seeds ").partition("-")
        found += [f"seed {seed}" for seed in range(int(first), int(last) + 1)] if "seeds " in name else [name.strip()]
    return found


if SIMULATED:
    from tests.accelerator import device as simulated


def use_accelerator(rank: int = 0) -> torch.device:
    """In a process of a test's: find the accelerator, and make the rank's device the current one."""
    if SIMULATED:
        from tests.accelerator import device

        name, _, seed = modes()[0].partition(" ")
        device.set_mode(name, int(seed or 0))
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    torch.accelerator.set_device_index(rank % torch.accelerator.device_count())
    return torch.device(kind.type, torch.accelerator.current_device_index())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.accelerator.is_available():
        skip = pytest.mark.skip(reason="needs an accelerator; tests/accelerator runs it on a simulated one")
        for item in items:
            if "tests/device" in str(item.path):
                item.add_marker(skip)


@pytest.fixture(autouse=True, params=modes())
def mode(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each test begins with its mode, and with its seed anew."""
    if SIMULATED:
        name, _, seed = request.param.partition(" ")
        simulated.set_mode(name, int(seed or 0))
    yield request.param
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
