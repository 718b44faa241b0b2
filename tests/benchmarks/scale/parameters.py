"""What the simulation is told. Nothing here is measured, but for what is None until it has been."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def _given(default: Any, what: str) -> Any:
    return field(default=default, metadata={"what": what})


@dataclass(frozen=True, slots=True)
class Parameters:
    """Each is an option of the program; ``what`` is its help."""

    tensors: int = _given(2169, "sharded tensors of the state; Llama 3 70B has 723, and AdamW two more for each")
    shards: int = _given(0, "ranks that the state is sharded over; with more ranks it is replicated (HSDP); 0: all")
    objects: int = _given(2, "PerRank objects of each rank")
    plain: int = _given(4, "values that are no DTensor and the same on all ranks of a kind")
    kinds: int = _given(1, "kinds of rank that differ in their plain values (stages of a pipeline)")
    parts: int = _given(1, "workers of each rank")

    skew_secs: float = _given(2.0, "ranks begin to save within so many seconds, evenly")
    write_secs: float = _given(10.0, "seconds that a part takes to write its bytes")
    timeout_secs: float = _given(600.0, "ranks.timeout_secs")
    seed: int = _given(0, "of when each rank begins")

    store_service_secs: float | None = _given(None, "the store's server, for one request; default: measured here")
    network_round_trip_secs: float = _given(1e-4, "from a rank to the store's server and back")
    link_bytes_per_sec: float = _given(3e9, "a rank's network link, for what stock DCP gathers and broadcasts")

    metadata_round_trip_secs: float = _given(5e-4, "from a rank to the file system's metadata server and back")
    open_secs: float = _given(2e-5, "the metadata server, to look a name up or open it")
    attributes_secs: float = _given(3e-6, "the metadata server, for stat or truncate")
    lock_secs: float = _given(2e-5, "the metadata server, for flock")
    create_secs: float = _given(6e-5, "the metadata server, for a new file or directory")
    rename_secs: float = _given(6e-5, "the metadata server, to rename")
    unlink_secs: float = _given(1e-5, "the metadata server, to remove a name")
    entry_secs: float = _given(1e-6, "the metadata server, for each name that it lists")
    fsync_secs: float = _given(5e-3, "fsync of a file or directory whose bytes are written already")
    client_bytes_per_sec: float = _given(1e9, "what one process reads or writes of a file")
    file_system_bytes_per_sec: float = _given(1e11, "what the file system gives to all processes together")

    def num_shards(self, num_ranks: int) -> int:
        return min(self.shards, num_ranks) if self.shards else num_ranks
