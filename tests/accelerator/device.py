"""``torch.sim``: the simulated accelerator as torch's device module, and what tests ask of it beyond that.

Importing this file registers the device type ``sim`` in this process, for good: it is then torch's current accelerator. So
only programs that are about it import it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

from tests.accelerator.build import load

NAME = "sim"

_simulator = load()


def _index(device: Any = None) -> int:
    if device is None:
        return int(_simulator.current_device())
    if isinstance(device, int):
        return device
    index = torch.device(device).index
    return int(_simulator.current_device()) if index is None else index


class SimulatedAccelerator(ModuleType):
    """The functions that torch, FSDP2 and programs look for in ``torch.<device type>``."""

    Stream = torch.Stream
    Event = torch.Event

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def is_initialized() -> bool:
        return any(_simulator.has_context(index) for index in range(_simulator.device_count()))

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def device_count() -> int:
        return int(_simulator.device_count())

    @staticmethod
    def current_device() -> int:
        return int(_simulator.current_device())

    @staticmethod
    def set_device(device: Any) -> None:
        _simulator.set_device(_index(device))

    @staticmethod
    def synchronize(device: Any = None) -> None:
        _simulator.synchronize(_index(device))

    @staticmethod
    def current_stream(device: Any = None) -> torch.Stream:
        return torch.accelerator.current_stream(torch.device(NAME, _index(device)))

    @staticmethod
    def set_stream(stream: torch.Stream) -> None:
        torch.accelerator.set_stream(stream)

    @staticmethod
    @contextmanager
    def stream(stream: torch.Stream | None) -> Iterator[None]:
        if stream is None:
            yield
            return
        before, device = torch.accelerator.current_stream(stream.device), _simulator.current_device()
        torch.accelerator.set_stream(stream)
        try:
            yield
        finally:
            torch.accelerator.set_stream(before)
            _simulator.set_device(device)

    @staticmethod
    @contextmanager
    def device(device: Any) -> Iterator[None]:
        before = _simulator.current_device()
        _simulator.set_device(_index(device))
        try:
            yield
        finally:
            _simulator.set_device(before)

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        _simulator.seed_all(seed)

    @staticmethod
    def manual_seed(seed: int) -> None:
        _simulator.seed_all(seed)

    @staticmethod
    def get_rng_state(device: Any = None) -> torch.Tensor:
        _simulator.synchronize(_index(device))
        state: torch.Tensor = _simulator.generator(_index(device)).get_state()
        return state

    @staticmethod
    def set_rng_state(state: torch.Tensor, device: Any = None) -> None:
        _simulator.synchronize(_index(device))
        _simulator.generator(_index(device)).set_state(state)

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    @staticmethod
    def memory_allocated(device: Any = None) -> int:
        return int(_simulator.memory_allocated(_index(device)))

    @staticmethod
    def max_memory_allocated(device: Any = None) -> int:
        return int(_simulator.max_memory_allocated(_index(device)))

    @staticmethod
    def empty_cache() -> None:
        """There is no cache to give back: freed memory is taken again first."""


def _register() -> None:
    torch.utils.rename_privateuse1_backend(NAME)
    module = SimulatedAccelerator(f"torch.{NAME}", SimulatedAccelerator.__doc__)
    torch._register_device_module(NAME, module)
    sys.modules[f"torch.{NAME}"] = module
    torch.utils.generate_methods_for_privateuse1_backend()


_register()


def set_mode(mode: str, seed: int = 0) -> None:
    """Choose when operations run: late, early, ahead, behind or seed (``simulator/scheduler.h`` says what each means)."""
    _simulator.set_mode(mode, seed)


def counters() -> dict[str, int]:
    """What has happened since ``reset_counters()``; see ``Counters`` in ``simulator/scheduler.h``."""
    return dict(_simulator.counters())


def reset_counters() -> None:
    """Begin counting anew; the peak of the devices' memory becomes what they hold now."""
    _simulator.reset_counters()


def has_context(index: int = 0) -> bool:
    """Whether this process has used the device."""
    return bool(_simulator.has_context(index))


def num_allocations(index: int = 0) -> int:
    """How often memory was taken from the device since ``reset_counters()``."""
    return int(_simulator.num_allocations(index))


def set_memory_limit(nbytes: int) -> None:
    """Let each device have so many bytes only."""
    _simulator.set_memory_limit(nbytes)


def register_host_memory(address: int, nbytes: int) -> None:
    """Let devices reach this memory: copies from and to it may be ``non_blocking``."""
    _simulator.register_host_memory(address, nbytes)


def unregister_host_memory(address: int) -> None:
    """Take back :func:`register_host_memory`."""
    _simulator.unregister_host_memory(address)


def num_registered() -> int:
    """How many ranges of host memory are registered."""
    return int(_simulator.num_registered())


class HostMemory:
    """Registers host memory with the simulated devices, as :class:`stager.workers.device.host_memory.Registrar` says."""

    def register(self, address: int, nbytes: int) -> str:
        try:
            register_host_memory(address, nbytes)
        except ValueError as error:
            return str(error)
        return ""

    def unregister(self, address: int) -> None:
        unregister_host_memory(address)
