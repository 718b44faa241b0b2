"""The accelerator of this process, as torch knows it: one type of device, of which there may be several."""

from __future__ import annotations

import torch

from stager.workers.device import cuda

NO_DEVICE_ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
"""Environment of a process that is to see no device: a context would take hundreds of MiB of each."""


def current() -> torch.device | None:
    """Return the type of the accelerator; None if there is none that can be used."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None


def is_in_use() -> bool:
    """Return whether this process has begun to use the accelerator. Asking begins nothing."""
    device = torch.accelerator.current_accelerator()
    if device is None:
        return False
    is_initialized = getattr(torch.get_device_module(device), "is_initialized", None)
    return is_initialized is None or bool(is_initialized())


def is_capturing() -> bool:
    """Return whether the current stream records a graph. Nothing runs then, and nothing may wait for the stream."""
    if not is_in_use():
        return False
    stream = torch.accelerator.current_stream()
    ask = getattr(stream, "is_capturing", None)  # newer versions of torch have it, for any accelerator
    return bool(ask()) if ask is not None else stream.device.type == "cuda" and cuda.is_capturing()


def has_streams(device: torch.device) -> bool:
    """Return whether work on this device is put into streams. Only torch's current accelerator has them."""
    accelerator = None if device.type == "cpu" else torch.accelerator.current_accelerator()
    return accelerator is not None and accelerator.type == device.type


def devices_in_use() -> list[torch.device]:
    """Return the devices that have a context, and the trainer's. Work on another one would create a context for it."""
    if not torch.accelerator.is_available():
        return []
    current_device = torch.accelerator.current_stream().device
    has_context = getattr(torch._C, f"_{current_device.type}_hasPrimaryContext", None)
    if has_context is None:  # torch tells it of CUDA and ROCm only
        return [current_device]
    devices = [torch.device(current_device.type, index) for index in range(torch.accelerator.device_count())]
    return [device for device in devices if device == current_device or has_context(device.index)]
