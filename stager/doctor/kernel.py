"""Checks of the kernel features that stager needs. Containers and sandboxes may forbid any of them."""

from __future__ import annotations

import re

from stager.doctor.finding import Finding, Status

_SANDBOX = "an old kernel, or a seccomp profile that forbids it: allow the call, or use another host"


def check_memfd(problem: str | None) -> Finding:
    """Judge whether buffers can be made.

    Args:
        problem: why an anonymous shared mapping could not be made and written; None if it could.
    """
    if problem is None:
        return Finding("memfd_create", "works", Status.OK, "buffers are anonymous shared memory without a name to leak")
    return Finding("memfd_create", problem, Status.FAIL, "no buffer can be made", f"Linux 3.17 is needed; {_SANDBOX}")


def check_populate_write(problem: str | None) -> Finding:
    """Judge whether the pages of a buffer can be allocated ahead.

    Args:
        problem: why ``madvise(MADV_POPULATE_WRITE)`` failed; None if it works.
    """
    name = "MADV_POPULATE_WRITE"
    if problem is None:
        return Finding(name, "works", Status.OK, "buffers are allocated ahead, off the training path (arena.prefault)")
    meaning = "buffers are allocated page by page when first written: the first save into each is several times slower"
    return Finding(
        name, problem, Status.WARN, meaning, "Linux 5.14 is needed; or call warmup() and expect a slow start"
    )


def check_huge_pages(shmem_enabled: str | None) -> Finding:
    """Tell the size of the pages that buffers are made of.

    Args:
        shmem_enabled: ``/sys/kernel/mm/transparent_hugepage/shmem_enabled``; None when it is not there.
    """
    name = "huge pages (shmem)"
    chosen = re.search(r"\[(\w+)\]", shmem_enabled or "")
    if chosen is None:
        return Finding(name, "not available", Status.OK, "buffers are made of small pages, which works")
    if chosen[1] in ("always", "within_size", "force"):
        return Finding(name, chosen[1], Status.OK, "buffers are made of huge pages where possible: fewer page faults")
    meaning = "buffers are made of small pages: more page faults when they are allocated, none after"
    return Finding(name, chosen[1], Status.OK, meaning)


def check_descriptor_passing(problem: str | None) -> Finding:
    """Judge whether buffers can be handed to workers.

    Args:
        problem: why a descriptor could not be sent over a socket pair; None if it could.
    """
    if problem is None:
        return Finding("SCM_RIGHTS", "works", Status.OK, "buffers are handed to workers as descriptors, without a copy")
    return Finding("SCM_RIGHTS", problem, Status.FAIL, "buffers cannot be handed to workers", _SANDBOX)


def check_pidfd(problem: str | None) -> Finding:
    """Judge whether workers can be watched.

    Args:
        problem: why ``pidfd_open`` failed; None if it works.
    """
    if problem is None:
        meaning = "the death of a worker, or of the trainer, is seen at once"
        return Finding("pidfd_open", "works", Status.OK, meaning)
    return Finding("pidfd_open", problem, Status.FAIL, "workers cannot be watched", f"Linux 5.3 is needed; {_SANDBOX}")
