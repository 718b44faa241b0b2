"""On what, and with which versions, the figures were measured."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from tests.benchmarks.launch import ROOT

_PACKAGES = ("torch", "numpy", "torch_checkpointing", "torchsnapshot", "transformers")
NO_GPU = "none"
_DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # of NVIDIA, of AMD, of the Linux subsystem of Windows
_WRITE_BYTES = 512 << 20


@dataclass(frozen=True, slots=True)
class Machine:
    """One machine; ``write_bytes_per_sec`` is pwrite and fsync of 512 MiB in the directory that was measured in."""

    cpu: str
    cores: int
    virtual: bool
    memory_bytes: int
    gpu: str
    kernel: str
    filesystem: str
    write_bytes_per_sec: float
    huge_pages: str
    nofile: int


@dataclass(frozen=True, slots=True)
class Versions:
    python: str
    stager: str
    packages: dict[str, str]
    commit: str | None


def describe_machine(directory: Path, scale: float) -> Machine:
    return Machine(
        cpu=_cpu("model name") or platform.processor(),
        cores=len(os.sched_getaffinity(0)),
        virtual=" hypervisor" in _cpu("flags"),
        memory_bytes=psutil.virtual_memory().total,
        gpu=_gpu(),
        kernel=platform.release(),
        filesystem=_filesystem(directory),
        write_bytes_per_sec=_write_rate(directory, max(1 << 20, int(_WRITE_BYTES * min(1.0, scale)))),
        huge_pages=_huge_pages(),
        nofile=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    )


def describe_versions() -> Versions:
    from stager import __version__

    return Versions(platform.python_version(), __version__, {name: _version(name) for name in _PACKAGES}, _commit())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _commit() -> str | None:
    """With "+" when the tree has changes that are not committed."""
    with suppress(OSError, subprocess.CalledProcessError):
        head = _git("rev-parse", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    return None


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _cpu(key: str) -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), "")


def _gpu() -> str:
    """In a process of its own: this one must not import torch, see ``cases.py``."""
    if not any(map(os.path.exists, _DRIVERS)):
        return NO_GPU
    command = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '" + NO_GPU + "')"
    return subprocess.run([sys.executable, "-c", command], check=True, capture_output=True, text=True).stdout.strip()


def _filesystem(directory: Path) -> str:
    path = str(directory.resolve())
    mounts = [p for p in psutil.disk_partitions(all=True) if path.startswith(p.mountpoint)]
    return max(mounts, key=lambda p: len(p.mountpoint)).fstype if mounts else "unknown"


def _huge_pages() -> str:
    with suppress(OSError):
        return Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text().strip()
    return "unknown"


def _write_rate(directory: Path, nbytes: int) -> float:
    piece = os.urandom(16 << 20)[:nbytes]
    path = directory / "rate"
    started = time.perf_counter()
    with open(path, "wb", buffering=0) as file:
        for _ in range(max(1, nbytes // len(piece))):
            file.write(piece)
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    written = path.stat().st_size
    path.unlink()
    return written / seconds
