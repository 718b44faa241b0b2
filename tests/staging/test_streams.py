"""The order of device work, on a fake accelerator that writes down what it is told. What a GPU then does: test_gpu.py."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from stager.torch_api.staging import DefaultStager, StagingOptions
from stager.workers.device import streams as device


class FakeAccelerator:
    """Two devices, a current stream per thread and device, and a log of (thread, what, details) in their order."""

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.trainer = threading.current_thread()
        self.index = {self.trainer: 1}  # the trainer uses device 1
        self.streams: dict[tuple[str, int], FakeStream] = {}
        self.kind = "xpu"

    def who(self) -> str:
        return "trainer" if threading.current_thread() is self.trainer else "staging"

    def current_index(self) -> int:
        return self.index.get(threading.current_thread(), 0)

    def is_available(self) -> bool:
        return True

    def current_accelerator(self) -> torch.device:
        return torch.device(self.kind)

    def device_count(self) -> int:
        return 2

    def current_stream(self, device: torch.device | None = None) -> FakeStream:
        index = self.current_index() if device is None else device.index
        default = FakeStream(self, f"{self.who()}-stream-{index}", torch.device(self.kind, index))
        return self.streams.get((self.who(), index), default)

    def set_stream(self, stream: FakeStream) -> None:
        self.index[threading.current_thread()] = stream.device.index
        self.streams[self.who(), stream.device.index] = stream
        self.log.append((self.who(), "use", stream.name))


class FakeStream:
    def __init__(self, fake: FakeAccelerator, name: str, device: torch.device) -> None:
        self.fake, self.name, self.device = fake, name, device

    def wait_stream(self, other: FakeStream) -> None:
        self.fake.log.append((self.fake.who(), "wait", self.name, other.name))

    def synchronize(self) -> None:
        self.fake.log.append((self.fake.who(), "synchronize", self.name))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeAccelerator:
    accelerator = FakeAccelerator()
    monkeypatch.setattr(torch, "accelerator", accelerator)
    monkeypatch.setattr(torch, "Stream", lambda device: FakeStream(accelerator, f"side-{device.index}", device))
    monkeypatch.setattr(device, "_streams", {})
    return accelerator


class Noting:
    """Part of a state: says in the log when and on which device it is copied."""

    def __init__(self, fake: FakeAccelerator) -> None:
        self.fake = fake

    def __deepcopy__(self, memo: dict[int, Any]) -> Noting:
        self.fake.log.append((self.fake.who(), "copy", self.fake.current_index()))
        return self


@pytest.mark.parametrize("non_blocking", [True, False])
def test_copies_wait_for_the_trainers_stream_and_run_on_the_stream_that_is_synchronized(
    fake: FakeAccelerator, non_blocking: bool
) -> None:
    with DefaultStager(StagingOptions(False, False, True, non_blocking)) as stager:
        stager.stage({"note": Noting(fake)}).result()
    assert fake.log == [
        ("trainer", "wait", "side-1", "trainer-stream-1"),  # before stage() returned, for the trainer's own stream
        ("staging", "use", "side-1"),
        ("staging", "copy", 1),  # on device 1, and not on device 0, where threads begin
        ("staging", "use", "staging-stream-1"),
        ("staging", "use", "staging-stream-0"),
        ("staging", "synchronize", "side-1"),
    ]


def test_without_a_thread_the_caller_copies_in_the_same_order(fake: FakeAccelerator) -> None:
    with DefaultStager(StagingOptions(False, False, False, True)) as stager:
        stager.stage({"note": Noting(fake)})
    assert fake.log == [
        ("trainer", "wait", "side-1", "trainer-stream-1"),
        ("trainer", "use", "side-1"),
        ("trainer", "copy", 1),
        ("trainer", "use", "trainer-stream-1"),
        ("trainer", "use", "trainer-stream-1"),
        ("trainer", "synchronize", "side-1"),
    ]


def test_side_stream_is_made_once_per_device(fake: FakeAccelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.device] = []
    make = torch.Stream
    monkeypatch.setattr(torch, "Stream", lambda device: (made.append(device), make(device))[1])
    devices = [torch.device("xpu", 1), torch.device("cpu"), torch.device("xpu", 0), torch.device("meta")]
    assert device.SideStreams(devices) and device.SideStreams(devices)
    assert made == [devices[0], devices[2]]


def test_trainers_device_is_current_while_copying_and_the_threads_own_afterwards(fake: FakeAccelerator) -> None:
    streams = device.SideStreams([torch.device("xpu", 1), torch.device("xpu", 0)])  # any order
    fake.index[fake.trainer] = 0
    with streams.stream():
        assert fake.current_index() == 1
        assert [fake.current_stream(torch.device("xpu", i)).name for i in range(2)] == ["side-0", "side-1"]
    assert fake.current_index() == 0
    assert [fake.current_stream(torch.device("xpu", i)).name for i in range(2)] == [
        "trainer-stream-0",
        "trainer-stream-1",
    ]


def test_only_devices_with_a_context_are_touched(fake: FakeAccelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.kind = "cuda"
    with_context: set[int] = set()
    monkeypatch.setattr(torch._C, "_cuda_hasPrimaryContext", with_context.__contains__, raising=False)
    for contexts, touched in ((set(), {"side-1"}), ({0, 1}, {"side-0", "side-1"})):
        with_context.update(contexts)
        fake.log.clear()
        with DefaultStager(StagingOptions(False, False, True, False)) as stager:
            stager.stage({"w": 1}).result()
        assert {entry[2] for entry in fake.log if entry[1] == "wait"} == touched
