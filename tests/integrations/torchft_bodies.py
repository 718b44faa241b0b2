"""Transports for torchft, in the test's process or in a child of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from unittest import TestCase

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torchft.checkpointing.transport_test import run_multi_recovery_test

from stager import StateMismatchError
from stager.integrations.torchft import StagerTransport
from tests.states import same

LONG, SHORT = timedelta(seconds=30), timedelta(seconds=0.2)


@dataclass
class Pair:
    """A sender and a receiver."""

    sender: StagerTransport
    receiver: StagerTransport

    def send(self, state: Any, step: int = 1, num_receivers: int = 1) -> None:
        self.sender.send_checkpoint(list(range(1, 1 + num_receivers)), step, state, LONG)

    def receive(self, step: int = 1, timeout: timedelta = LONG, metadata: str | None = None) -> Any:
        return self.receiver.recv_checkpoint(0, metadata or self.sender.metadata(), step, timeout)

    def moved(self, state: Any, step: int = 1) -> Any:
        """A state, sent and received."""
        self.send(state, step)
        received = self.receive(step)
        self.sender.disallow_checkpoint()
        return received

    def num_leased(self) -> int:
        """How many pieces of the sender's memory hold a snapshot."""
        pool: Any = self.sender._stager.memory
        return sum(buffer.is_leased() for buffer in pool._all.values())

    def until_idle(self) -> None:
        """Until the sender has noticed that its receivers are done."""
        until(lambda: not self.sender._connections)


@contextmanager
def pair_of(**options: Any) -> Iterator[Pair]:
    sender = StagerTransport(host="localhost", secret=options.get("secret"))
    receiver = StagerTransport(host="localhost", **options)
    try:
        yield Pair(sender, receiver)
    finally:
        sender.shutdown()
        receiver.shutdown()


def until(holds: Callable[[], Any]) -> None:
    """Wait until something holds that other threads do."""
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        threading.Event().wait(0.002)


def in_thread(do: Callable[[], Any]) -> Future[Any]:
    threads = ThreadPoolExecutor(1)
    future = threads.submit(do)
    threads.shutdown(wait=False)
    return future


def nested(user: Any) -> dict[str, Any]:
    """As torchft's Manager nests a state."""
    return {"user": {"default": user}, "torchft": {"step": 7, "batches_committed": 12}}


def large(value: float = 1.0) -> dict[str, Any]:
    """More than what fits into the buffers of a connection: a receiver that does not read keeps the sender waiting."""
    return nested({"weights": torch.full((8 << 20,), value)})


# -- in a child, which a process group leaves descriptors in ----------------------------------------------------------


def alone() -> Any:
    """A mesh of this process."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    return init_device_mesh("cpu", (1,))


def contract() -> None:
    """The test that torchft has for transports."""
    run_multi_recovery_test(TestCase(), lambda rank, size: StagerTransport(host="localhost"), torch.device("cpu"))


def sharded_tensors_arrive_as_they_were_placed() -> None:
    mesh = alone()
    whole = torch.arange(12.0).reshape(4, 3)
    sent = {
        "sharded": distribute_tensor(whole, mesh, [Shard(1)]),
        "same": distribute_tensor(whole, mesh, [Replicate()]),
    }
    with pair_of() as pair:
        received = pair.moved(nested(sent))["user"]["default"]
    for name, tensor in sent.items():
        assert isinstance(received[name], DTensor)
        assert received[name].placements == tensor.placements and received[name].device_mesh == mesh
        assert torch.equal(received[name].full_tensor(), whole)


def tensors_that_are_given_are_filled_in_place() -> None:
    mesh = alone()

    def made(value: float) -> dict[str, Any]:
        model = torch.nn.Linear(3, 2)
        torch.nn.init.constant_(model.weight, value)
        sharded = distribute_tensor(torch.full((4, 2), value), mesh, [Shard(0)])
        return {
            "model": model.state_dict(),
            "sharded": sharded,
            "row-major here, column-major there": torch.full((2, 3), value).t().contiguous().t() * 1,
        }

    target, source = nested(made(1.0)), nested({**made(2.0), "only there": torch.ones(2)})
    held = [value for value in target["user"]["default"].values() if isinstance(value, torch.Tensor)]
    with pair_of(state_dict=lambda: target) as filling:
        received = filling.moved(source)
    assert same(received["user"]["default"]["model"], source["user"]["default"]["model"])
    assert torch.equal(received["user"]["default"]["only there"], torch.ones(2))
    for name, value in target["user"]["default"]["model"].items():
        assert torch.equal(value, source["user"]["default"]["model"][name])
        assert value.data_ptr() == received["user"]["default"]["model"][name].data_ptr()
    assert torch.equal(held[0].to_local(), torch.full((4, 2), 2.0))
    assert received["user"]["default"]["sharded"].to_local().data_ptr() == held[0].to_local().data_ptr()
    assert torch.equal(held[1], torch.full((3, 2), 2.0).t().contiguous().t().reshape(held[1].shape))


def what_does_not_fit_changes_nothing() -> None:
    mesh = alone()
    first, second = torch.ones(2), torch.ones(3)
    others = {
        "shape": (torch.zeros(4), r"\['second'\] is torch.float32 of shape \(3,\), and torch.float32 of shape \(4,\)"),
        "dtype": (torch.zeros(3, dtype=torch.int8), "torch.int8 of shape"),
        "kind": (distribute_tensor(torch.zeros(3), mesh, [Shard(0)]), "is a Tensor, and a DTensor was received"),
        "layout": (torch.zeros(3).to_sparse(), "layout torch.sparse_coo"),
    }
    with pair_of(state_dict=lambda: {"first": first, "second": second}) as filling:
        for step, (other, message) in enumerate(others.values()):
            with pytest.raises(StateMismatchError, match=message):
                filling.moved({"first": torch.zeros(2), "second": other}, step)
    sharded = distribute_tensor(torch.ones(3), mesh, [Shard(0)])
    with pair_of(state_dict=lambda: {"x": sharded}) as filling:
        with pytest.raises(StateMismatchError, match="is placed as"):
            filling.moved({"x": distribute_tensor(torch.zeros(3), mesh, [Replicate()])})
    assert first.tolist() == [1, 1] and second.tolist() == [1, 1, 1] and sharded.to_local().tolist() == [1, 1, 1]
