"""The ways to save that are compared, by name. Each file holds one library's, and imports it when it is opened."""

from __future__ import annotations

from tests.benchmarks.peers import dcp, ours, raw, snapshot, tc, torch_save
from tests.benchmarks.peers.contracts import Peer, Pending, Session

PEERS: dict[str, Peer] = {
    peer.name: peer for module in (ours, torch_save, dcp, tc, snapshot, raw) for peer in module.PEERS
}

__all__ = ["PEERS", "Peer", "Pending", "Session"]
