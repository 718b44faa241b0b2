"""Explaining a verdict, and which settings to change."""

from __future__ import annotations

from collections.abc import Iterator

from stager.config import StagerConfig
from stager.config.sizes import format_bytes
from stager.doctor.resources import FDS_OF_A_TRAINER
from stager.planning.need import Need, Verdict


def advise(need: Need, config: StagerConfig) -> tuple[str, ...]:
    """Return sentences, the most important one first; none if everything fits."""
    return (*_on_memory(need, config), *_on_descriptors(need))


def _on_memory(need: Need, config: StagerConfig) -> Iterator[str]:
    verdict, whole = need.verdict, need.wanted_arena_nbytes
    if verdict is Verdict.FITS:
        return
    if verdict is Verdict.NO_MEMORY:
        yield (
            f"arena.max_host_bytes ({config.arena.max_host_bytes}) allows more than the host has: its "
            f"{need.job.local_world_size} ranks take {format_bytes(need.host_nbytes)}, and "
            f"{format_bytes(need.host.available_bytes)} are available. Lower it, and run `stager plan` again"
        )
    elif verdict is Verdict.FEWER:
        yield (
            f"{need.staging.num_in_flight} of {need.num_buffers} snapshots can be in flight at a time. A save that finds no "
            f"free buffer does what arena.when_full ({config.arena.when_full}) says, until an earlier save is committed"
        )
    elif verdict is Verdict.PIECES:
        yield (
            f"a snapshot needs {format_bytes(need.rank.slab_nbytes)}, and arena.max_host_bytes allows "
            f"{format_bytes(need.budget_nbytes)}. So save() copies and writes {need.staging.num_pieces} pieces, through "
            f"buffers of {format_bytes(need.staging.buffer_nbytes)}, and returns when the last one is copied: training "
            "waits for most of the time that writing takes, with guard(), too"
        )
        yield f"for one whole snapshot, set arena.max_host_bytes to {_size(need.rank.slab_nbytes)} or more"
    else:
        yield "save() will raise MemoryBudgetError: not even a piece of a snapshot fits"
    yield _more_memory(need, whole)


def _more_memory(need: Need, arena_nbytes: int) -> str:
    """How to get memory for all buffers."""
    on_host = need.job.local_world_size * (arena_nbytes + need.worker_nbytes + need.replica_nbytes)
    setting = f"for {need.num_buffers} whole snapshots, set arena.max_host_bytes to {_size(arena_nbytes)} or more"
    if on_host <= need.host.available_bytes:
        return f"{setting}: the host has it"
    return (
        f"{setting}, on a host with {format_bytes(on_host)} available (this one has "
        f"{format_bytes(need.host.available_bytes)}); or save less, or shard the state over more hosts"
    )


def _on_descriptors(need: Need) -> Iterator[str]:
    limit = need.host.max_open_files
    if limit is not None and limit < need.num_descriptors + FDS_OF_A_TRAINER:
        yield f"only {limit} open files are allowed, which leaves few for the trainer: ulimit -n {limit + 1024}"


def _size(nbytes: int) -> str:
    return f"{nbytes} ({format_bytes(nbytes)})"
