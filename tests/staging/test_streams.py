"""The order of device work, on a fake accelerator that writes down what it is told. What a GPU then does: test_gpu.py."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from stager.torch_api.staging import DefaultStager, StagingOptions, streams


class FakeAccelerator:
    """Two devices, a current stream per thread and device, and a log of (event, details) in the order they happened."""

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.trainer = threading.current_thread()
        self.index = {self.trainer: 1}  # the trainer uses device 1

    def who(self) -> str:
        return "trainer" if threading.current_thread() is self.trainer else "staging"

    def is_available(self) -> bool:
        return True

    def current_accelerator(self) -> torch.device:
        return torch.device("xpu")

    def device_count(self) -> int:
        return 2

    def current_device_index(self) -> int:
        return self.index.get(threading.current_thread(), 0)

    def set_device_index(self, index: int) -> None:
        self.index[threading.current_thread()] = index
        self.log.append((self.who(), "device", index))

    def current_stream(self, index: int) -> Any:
        return FakeStream(self, f"{self.who()}-stream-{index}")

    def set_stream(self, stream: Any) -> None:
        self.log.append((self.who(), "use", stream.name))


class FakeStream:
    def __init__(self, fake: FakeAccelerator, name: str) -> None:
        self.fake, self.name = fake, name

    def wait_event(self, event: Any) -> None:
        self.fake.log.append((self.fake.who(), "wait", self.name, event.recorded))

    def synchronize(self) -> None:
        self.fake.log.append((self.fake.who(), "synchronize", self.name))


class FakeEvent:
    def __init__(self, fake: FakeAccelerator) -> None:
        self.fake, self.recorded = fake, ""

    def record(self, stream: FakeStream) -> None:
        self.recorded = stream.name
        self.fake.log.append((self.fake.who(), "record", stream.name))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeAccelerator]:
    accelerator = FakeAccelerator()
    monkeypatch.setattr(torch, "accelerator", accelerator)
    monkeypatch.setattr(torch, "Stream", lambda device: FakeStream(accelerator, f"side-{device.index}"))
    monkeypatch.setattr(torch, "Event", lambda device: FakeEvent(accelerator))
    yield accelerator


class Noting:
    """Part of a state: says in the log when it is copied."""

    def __init__(self, fake: FakeAccelerator) -> None:
        self.fake = fake

    def __deepcopy__(self, memo: dict[int, Any]) -> Noting:
        self.fake.log.append((self.fake.who(), "copy"))
        return self


def test_copies_wait_for_the_trainers_stream_and_run_on_the_stream_that_is_synchronized(fake: FakeAccelerator) -> None:
    with DefaultStager(StagingOptions(False, False, True, True)) as stager:
        stager.stage({"note": Noting(fake)}).result()
    assert fake.log == [
        ("trainer", "record", "trainer-stream-1"),  # before stage() returned, on the trainer's own stream
        ("staging", "wait", "side-1", "trainer-stream-1"),
        ("staging", "use", "side-1"),
        ("staging", "device", 1),  # and not device 0, where threads begin
        ("staging", "copy"),
        ("staging", "synchronize", "side-1"),
    ]


def test_blocking_copies_also_wait_for_the_trainers_stream(fake: FakeAccelerator) -> None:
    with DefaultStager(StagingOptions(False, False, True, False)) as stager:
        stager.stage({"note": Noting(fake)}).result()
    assert [entry[1] for entry in fake.log] == ["record", "wait", "use", "device", "copy", "synchronize"]


def test_without_a_thread_copies_run_on_the_callers_stream(fake: FakeAccelerator) -> None:
    with DefaultStager(StagingOptions(False, False, False, True)) as stager:
        stager.stage({"note": Noting(fake)})
    assert fake.log == [("trainer", "copy"), ("trainer", "synchronize", "trainer-stream-1")]


def test_side_stream_is_made_once_per_device(fake: FakeAccelerator) -> None:
    side = streams.StagingStreams()
    first, second = side.fence(), side.fence()
    assert first.events[0][2] is second.events[0][2]


def test_only_devices_with_a_context_are_touched(fake: FakeAccelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.current_accelerator = lambda: torch.device("cuda")
    with_context: set[int] = set()
    monkeypatch.setattr(torch._C, "_cuda_hasPrimaryContext", with_context.__contains__, raising=False)
    fence = streams.StagingStreams().fence()
    assert fence is not None
    assert [index for index, _, _ in fence.events] == [1]
    with_context.update((0, 1))
    fence = streams.StagingStreams().fence()
    assert fence is not None
    assert [index for index, _, _ in fence.events] == [0, 1]
