"""What a recovery takes with torchft's transports, and with stager's: ``python -m tests.integrations.compare_torchft``.

Two processes, as two replica groups. In each round, with each transport, both come to a barrier; then one calls
``send_checkpoint()`` and ``disallow_checkpoint()``, and the other ``recv_checkpoint()``. The healthy replica goes on when
the former two have returned.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from importlib.metadata import version
from typing import Any

import torch
from torch.distributed import TCPStore
from torchft import ProcessGroupGloo
from torchft.checkpointing.http_transport import HTTPTransport
from torchft.checkpointing.pg_transport import PGTransport
from torchft.process_group import reconfigure_with_store

from stager.integrations.torchft import StagerTransport
from stager.workers._version import __version__

_LONG = timedelta(seconds=120)
WAYS = ("HTTPTransport", "HTTPTransport, 4 chunks", "PGTransport, in place", "stager", "stager, in place")


def _state(nbytes: int, value: float) -> dict[str, Any]:
    tensors = {f"layer.{index}": torch.full((1 << 20,), value) for index in range(nbytes >> 22)}
    return {"user": {"default": tensors}, "torchft": {"step": 1, "batches_committed": 1}}


def _transports(rank: int, store: str, target: Callable[[], Any]) -> dict[str, Any]:
    group = ProcessGroupGloo(timeout=_LONG)
    reconfigure_with_store(group, store, rank, 2)
    return {
        "HTTPTransport": HTTPTransport(_LONG, num_chunks=0),
        "HTTPTransport, 4 chunks": HTTPTransport(_LONG, num_chunks=4),
        "PGTransport, in place": PGTransport(group, _LONG, torch.device("cpu"), target),
        "stager": StagerTransport(host="localhost"),
        "stager, in place": StagerTransport(host="localhost", state_dict=target),
    }


def _healthy(pipe: Any, store: str, nbytes: int, rounds: int) -> list[tuple[str, float, float]]:
    """Returns the way, and seconds until send_checkpoint() and disallow_checkpoint() have returned, of each round."""
    state = _state(nbytes, 1.0)
    transports = _transports(0, store, lambda: state)
    pipe.send({way: transport.metadata() for way, transport in transports.items()})
    taken = []
    for number in range(rounds):
        for way in _in_turn(number):
            pipe.send(way)
            pipe.recv()  # the other is there, too
            begun = time.perf_counter()
            transports[way].send_checkpoint([1], number, state, _LONG)
            sent = time.perf_counter()
            if way.startswith("HTTP"):
                pipe.recv()  # what it serves is the state itself: the receiver must have it before it is disallowed
            transports[way].disallow_checkpoint()
            gone_on = time.perf_counter()
            if not way.startswith("HTTP"):
                pipe.recv()
            taken.append((way, sent - begun, gone_on - begun))
    pipe.send(None)
    pipe.recv()
    for transport in transports.values():
        transport.shutdown()
    return taken


def _recovering(pipe: Any, store: str, nbytes: int) -> None:
    """Sends back the seconds that each recv_checkpoint() took."""
    warnings.simplefilter("ignore")
    state = _state(nbytes, 0.0)
    transports = _transports(1, store, lambda: state)
    metadata = pipe.recv()
    taken: list[tuple[str, float]] = []
    numbers = dict.fromkeys(WAYS, 0)
    while (way := pipe.recv()) is not None:
        pipe.send("there")
        begun = time.perf_counter()
        received = transports[way].recv_checkpoint(0, metadata[way], numbers[way], _LONG)
        taken.append((way, time.perf_counter() - begun))
        pipe.send("received")
        numbers[way] += 1
        assert all(bool((tensor == 1).all()) for tensor in received["user"]["default"].values())
        del received
        for tensor in state["user"]["default"].values():
            tensor.zero_()
    pipe.send(taken)
    for transport in transports.values():
        transport.shutdown()


def _in_turn(number: int) -> tuple[str, ...]:
    """None is always the first."""
    first = number % len(WAYS)
    return (*WAYS[first:], *WAYS[:first])


def main() -> None:
    """Print a table of medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=240, help="size of the state")
    parser.add_argument("--rounds", type=int, default=6, help="the first of them is listed apart: memory is new then")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    nbytes = options.mib << 20
    master = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    store = f"localhost:{master.port}/compare"
    here, there = multiprocessing.Pipe()
    other = multiprocessing.get_context("spawn").Process(target=_recovering, args=(there, store, nbytes))
    other.start()
    results: list[Any] = []

    class Ear:
        """The pipe, whose last message is the other's list."""

        send = here.send

        def recv(self) -> Any:
            message = here.recv()
            if isinstance(message, list):
                results.append(message)
            return message

    taken = _healthy(Ear(), store, nbytes, options.rounds)
    other.join()
    (received,) = results
    print(
        f"torchft-nightly {version('torchft-nightly')}, torch {torch.__version__}, stager {__version__}, Python "
        f"{platform.python_version()}; {nbytes / 1e6:.0f} MB; medians of {options.rounds - 1} rounds (the first round)"
    )
    for way in WAYS:
        send, goes_on = ([row[column] for row in taken if row[0] == way] for column in (1, 2))
        receive = [secs for name, secs in received if name == way]
        cells = [f"{statistics.median(secs[1:]):6.3f} s ({secs[0]:.3f})" for secs in (send, goes_on, receive)]
        print(f"{way:24} send_checkpoint {cells[0]}   goes on after {cells[1]}   recv_checkpoint {cells[2]}")


if __name__ == "__main__":
    main()
