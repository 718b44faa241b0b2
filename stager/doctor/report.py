"""All checks, in the order of the report."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Mapping

from stager.config import StagerConfig
from stager.doctor import probes
from stager.doctor.finding import Finding
from stager.doctor.kernel import (
    check_descriptor_passing,
    check_huge_pages,
    check_memfd,
    check_pidfd,
    check_populate_write,
)
from stager.doctor.resources import (
    check_cores,
    check_dev_shm,
    check_locked_memory,
    check_memory,
    check_open_files,
    check_processes,
)
from stager.doctor.software import check_cuda, check_python, check_torch
from stager.doctor.store import check_store
from stager.doctor.target import check_filesystem, check_free_space, check_lock, check_write
from stager.doctor.target_probe import existing_directory, probe_target
from stager.ranks.launch import local_world_size
from stager.workers.checkpoint.storage.places import is_url


def run_checks(directory: str, config: StagerConfig, environ: Mapping[str, str] | None = None) -> list[Finding]:
    """Look at this host, and at ``directory`` as a place for checkpoints: a path, or a URL in an object store.

    Writes at most 64 MiB into ``directory``, or the nearest one above it that exists, and removes it again.
    """
    world_size = local_world_size(os.environ if environ is None else environ)
    cuda = probes.cuda_facts()
    return [
        check_python(probes.python_version(), sys.platform),
        check_torch(*probes.torch_version()),
        check_cuda(cuda),
        *_resource_findings(config, world_size, registers=bool(cuda.devices) and cuda.registers),
        *_kernel_findings(),
        *_target_findings(directory),
    ]


def _resource_findings(config: StagerConfig, world_size: int, registers: bool) -> list[Finding]:
    cores = probes.core_facts(world_size)
    num_workers = config.workers.resolve_count(world_size, cores.usable)
    soft_files, hard_files = probes.soft_and_hard_limit(resource.RLIMIT_NOFILE)
    return [
        check_cores(cores, config),
        check_memory(probes.memory_facts(world_size), config),
        check_dev_shm(*(probes.dev_shm_bytes() or (None, 0))),
        check_open_files(soft_files, hard_files, config, num_workers),
        check_locked_memory(probes.soft_and_hard_limit(resource.RLIMIT_MEMLOCK)[0], registers),
        check_processes(probes.process_facts(), num_workers),
    ]


def _kernel_findings() -> list[Finding]:
    return [
        check_memfd(probes.try_memfd()),
        check_populate_write(probes.try_populate_write()),
        check_huge_pages(probes.shmem_huge_pages()),
        check_descriptor_passing(probes.try_descriptor_passing()),
        check_pidfd(probes.try_pidfd()),
    ]


def _target_findings(directory: str) -> list[Finding]:
    if is_url(directory):
        return list(check_store(directory))
    existing = existing_directory(directory)
    probe = probe_target(directory)
    lock = check_lock(probe)
    return [
        check_filesystem(probes.mount_of(existing)),
        check_free_space(*probes.free_space(existing)),
        check_write(probe),
        *([] if lock is None else [lock]),
    ]
