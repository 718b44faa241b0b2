"""Checks of Python, torch and the accelerator."""

from __future__ import annotations

import re
from dataclasses import dataclass

from stager.doctor.finding import Finding, Status

MIN_PYTHON = (3, 10)
MIN_TORCH = (2, 6)


def check_python(version: tuple[int, int, int], platform: str) -> Finding:
    """Judge the version of Python, and the platform.

    Args:
        version: major, minor, micro.
        platform: ``sys.platform``.
    """
    value = f"{'.'.join(map(str, version))} on {platform}"
    if platform != "linux":
        advice = "run it on Linux (WSL 2 and containers count)"
        return Finding("Python", value, Status.FAIL, "stager needs Linux: memfd, pidfd, passing of descriptors", advice)
    if version[:2] < MIN_PYTHON:
        return Finding("Python", value, Status.FAIL, "stager needs Python 3.10 or newer", "install a newer Python")
    return Finding("Python", value, Status.OK, "supported")


def check_torch(version: str | None, problem: str = "") -> Finding:
    """Judge the version of torch.

    Args:
        version: ``torch.__version__``; None when torch cannot be imported.
        problem: why it cannot.
    """
    if version is None:
        return Finding("torch", "cannot be imported", Status.FAIL, problem, "pip install 'torch>=2.6'")
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or (int(numbers[1]), int(numbers[2])) < MIN_TORCH:
        return Finding("torch", version, Status.FAIL, "stager needs torch 2.6 or newer", "pip install 'torch>=2.6'")
    return Finding("torch", version, Status.OK, "supported")


@dataclass(frozen=True)
class CudaFacts:
    """What torch and the driver say about CUDA.

    Attributes:
        build: the CUDA (or ROCm) version torch was built for; None for a CPU build.
        driver: the NVIDIA kernel driver's version; None without one.
        devices: names of the devices torch sees.
        problem: what torch said when asked for devices; empty if nothing.
        kind: torch's name of the type of device.
        registers: whether its backend can page-lock memory that somebody else allocated.
    """

    build: str | None
    driver: str | None
    devices: tuple[str, ...]
    problem: str = ""
    kind: str = "cuda"
    registers: bool = True


def check_cuda(facts: CudaFacts) -> Finding:
    """Judge whether torch can use the GPUs."""
    driver = f"driver {facts.driver}" if facts.driver else "no NVIDIA driver"
    if facts.devices:
        counted = (
            f"{len(facts.devices)} x {facts.devices[0]}" if len(set(facts.devices)) == 1 else ", ".join(facts.devices)
        )
        how = (
            "through page-locked buffers (arena.pin)"
            if facts.registers
            else "through two page-locked buffers of 32 MiB, because this backend cannot page-lock the snapshot's own memory"
        )
        if facts.kind != "cuda":
            meaning = f"tensors on {facts.kind} devices are staged {how}; workers use no device"
            return Finding(facts.kind, counted, Status.OK, meaning)
        name = "ROCm" if (facts.build or "").startswith("ROCm") else "CUDA"
        built = f"{counted}; torch for {facts.build}" + (f"; {driver}" if name == "CUDA" else "")
        meaning = f"tensors on {name} devices are staged {how}; workers create no {name} context"
        return Finding(name, built, Status.OK, meaning)
    if facts.driver is None:
        value = f"none ({driver}; torch is {'for ' + facts.build if facts.build else 'a CPU build'})"
        return Finding(
            "CUDA", value, Status.OK, "CPU tensors only; stager needs no CUDA, and does not page-lock buffers"
        )
    if facts.build is None:
        value, advice = f"{driver}; torch is a CPU build", "install a torch build for CUDA to train on the GPU"
        return Finding("CUDA", value, Status.WARN, "there is a GPU driver that this torch cannot use", advice)
    problem = f": {facts.problem}" if facts.problem else ""
    return Finding(
        "CUDA",
        f"no device; {driver}; torch for {facts.build}",
        Status.WARN,
        f"torch sees no device although a driver is loaded{problem}; CPU tensors are staged all the same",
        "check nvidia-smi, CUDA_VISIBLE_DEVICES, and that the driver is new enough for this torch",
    )
