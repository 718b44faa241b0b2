"""What the ranks of a simulated job share."""

from __future__ import annotations

from stager.ranks import commit_watch, rendezvous
from stager.ranks.rendezvous import poll_secs
from tests.benchmarks.scale.costs import Costs
from tests.benchmarks.scale.filesystem import Directory, FileSystem
from tests.benchmarks.scale.parameters import Parameters
from tests.benchmarks.scale.simulation import Simulation
from tests.benchmarks.scale.store import Store


class World:
    """
    Args:
        costs: of a commit of this size.

    Attributes:
        wait_poll_secs: between two looks for a message that is waited for, in the end (``Rendezvous.wait``).
        end_poll_secs: between two looks for the end of a save, in the end (``CommitWatch``).
    """

    def __init__(self, parameters: Parameters, num_ranks: int, costs: Costs) -> None:
        self.parameters = parameters
        self.num_ranks = num_ranks
        self.costs = costs
        self.wait_poll_secs = poll_secs(num_ranks, rendezvous._LAST_POLL_SECS)
        self.end_poll_secs = poll_secs(num_ranks, commit_watch._LAST_POLL_SECS)
        self.simulation = Simulation()
        self.store = Store(self.simulation, parameters)
        self.files = FileSystem(self.simulation, parameters)
        self.directory = Directory(self.simulation, self.files, num_ranks * parameters.parts)
