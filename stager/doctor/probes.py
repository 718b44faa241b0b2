"""Looking up what the checks judge. All that touches the system is here, and in ``target_probe.py``."""

from __future__ import annotations

import array
import ctypes
import mmap
import os
import re
import resource
import socket
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import psutil

from stager.config.host import Cgroup
from stager.doctor.resources import CoreFacts, MemoryFacts, ProcessFacts
from stager.doctor.software import CudaFacts
from stager.doctor.target import Mount, find_mount, parse_mountinfo

_MADV_POPULATE_WRITE = 23  # linux/mman.h; not in the mmap module
_PROBE_BYTES = 1 << 20


def torch_version() -> tuple[str | None, str]:
    """(version, "") or (None, why it cannot be imported)."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library of it is missing
        return None, str(error)
    return str(torch.__version__), ""


def cuda_facts() -> CudaFacts:
    """Ask torch for devices, without creating a CUDA context. No torch counts as a CPU build."""
    if torch_version()[0] is None:
        return CudaFacts(None, _nvidia_driver(), ())
    import torch

    from stager.workers.device import accelerator, host_memory
    from stager.workers.device.cuda import device_names

    hip = getattr(torch.version, "hip", None)
    build = f"ROCm {hip}" if hip else f"CUDA {torch.version.cuda}" if torch.version.cuda else None
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            device = accelerator.current()
            if device is not None and device.type != "cuda":
                names = (device.type,) * torch.accelerator.device_count()
                return CudaFacts(None, None, names, kind=device.type, registers=host_memory.can_register())
            devices = device_names()
        except (RuntimeError, AssertionError) as error:
            return CudaFacts(build, _nvidia_driver(), (), _first_line(error))
    return CudaFacts(build, _nvidia_driver(), devices, _first_line(said[0].message) if said else "")


def core_facts(world_size: int) -> CoreFacts:
    """Look up the cores that this process may use."""
    return CoreFacts(
        online=os.cpu_count() or 1,
        affinity=len(os.sched_getaffinity(0)),
        quota=Cgroup.of_this_process().cpu_quota_cores(),
        local_world_size=world_size,
    )


def memory_facts(world_size: int) -> MemoryFacts:
    """Look up the memory that this process may use."""
    memory, cgroup = psutil.virtual_memory(), Cgroup.of_this_process()
    return MemoryFacts(
        total=memory.total,
        available=memory.available,
        cgroup_limit=cgroup.memory_limit_bytes(),
        cgroup_headroom=cgroup.memory_headroom_bytes(),
        local_world_size=world_size,
    )


def dev_shm_bytes() -> tuple[int, int] | None:
    """(total, free) of ``/dev/shm``; None when it is not mounted."""
    if not os.path.ismount("/dev/shm"):
        return None
    stats = os.statvfs("/dev/shm")
    return stats.f_blocks * stats.f_frsize, stats.f_bavail * stats.f_frsize


def soft_and_hard_limit(which: int) -> tuple[int | None, int | None]:
    """A resource limit; None is unlimited."""
    soft, hard = (None if limit == resource.RLIM_INFINITY else limit for limit in resource.getrlimit(which))
    return soft, hard


def process_facts() -> ProcessFacts:
    """Look up how many more processes and threads may be started."""
    limit, used = Cgroup.of_this_process().threads()
    return ProcessFacts(soft_and_hard_limit(resource.RLIMIT_NPROC)[0], limit, used, is_root=os.geteuid() == 0)


def try_memfd() -> str | None:
    """Make, map and write an anonymous shared file. Returns why that failed, or None."""
    return _problem(lambda: _with_mapping(lambda mapping: mapping.write(b"x" * mmap.PAGESIZE)))


def try_populate_write() -> str | None:
    """Try ``madvise(MADV_POPULATE_WRITE)``. Returns why that failed, or None."""
    return _problem(lambda: _with_mapping(_populate))


def try_descriptor_passing() -> str | None:
    """Send a descriptor over a socket pair. Returns why that failed, or None."""
    return _problem(_send_a_descriptor)


def try_pidfd() -> str | None:
    """Try ``pidfd_open``. Returns why that failed, or None."""
    if not hasattr(os, "pidfd_open"):
        return "not in this Python build"
    return _problem(lambda: os.close(os.pidfd_open(os.getpid())))


def shmem_huge_pages() -> str | None:
    """Read the setting of huge pages for shared memory; None if the kernel has none."""
    try:
        return Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled").read_text().strip()
    except OSError:
        return None


def mount_of(directory: str) -> Mount | None:
    """The mount that ``directory`` (without symbolic links) is on."""
    text = Path("/proc/self/mountinfo").read_text(errors="surrogateescape")
    return find_mount(parse_mountinfo(text), directory)


def free_space(directory: str) -> tuple[int, int, int | None]:
    """(free bytes, total bytes, free inodes or None) of the file system of ``directory``."""
    stats = os.statvfs(directory)
    inodes = stats.f_favail if stats.f_files else None
    return stats.f_bavail * stats.f_frsize, stats.f_blocks * stats.f_frsize, inodes


def python_version() -> tuple[int, int, int]:
    """Return major, minor and micro version of Python."""
    return sys.version_info.major, sys.version_info.minor, sys.version_info.micro


def _problem(attempt: Callable[[], object]) -> str | None:
    try:
        attempt()
    except OSError as error:
        return f"fails: {error.strerror or error}"
    return None


def _with_mapping(use: Callable[[mmap.mmap], object]) -> None:
    fd = os.memfd_create("stager-doctor", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, _PROBE_BYTES)
        with mmap.mmap(fd, _PROBE_BYTES) as mapping:
            use(mapping)
    finally:
        os.close(fd)


def _populate(mapping: mmap.mmap) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    pointer = (ctypes.c_char * _PROBE_BYTES).from_buffer(mapping)
    try:
        if libc.madvise(ctypes.addressof(pointer), _PROBE_BYTES, _MADV_POPULATE_WRITE) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
    finally:
        del pointer  # the mapping cannot be closed while it is exported


def _send_a_descriptor() -> None:
    here, there = socket.socketpair()
    with here, there:
        fds = array.array("i", [here.fileno()])
        here.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
        _, ancillary, _, _ = there.recvmsg(1, socket.CMSG_SPACE(fds.itemsize))
        if not ancillary:
            raise OSError("the message arrived without its descriptor")
        received = array.array("i", ancillary[0][2][: fds.itemsize])
        os.close(received[0])


def _nvidia_driver() -> str | None:
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", text)
    return found[1] if found else "of unknown version"


def _first_line(problem: object) -> str:
    return str(problem).strip().partition("\n")[0]
