"""What the ranks of a simulated job share."""

from __future__ import annotations

from tests.benchmarks.scale.costs import Costs
from tests.benchmarks.scale.filesystem import Directory, FileSystem
from tests.benchmarks.scale.parameters import Parameters
from tests.benchmarks.scale.rules import Rules
from tests.benchmarks.scale.simulation import Simulation
from tests.benchmarks.scale.store import Store


class World:
    """
    Args:
        costs: of a commit of this size.
    """

    def __init__(self, parameters: Parameters, num_ranks: int, costs: Costs, rules: Rules) -> None:
        self.parameters = parameters
        self.num_ranks = num_ranks
        self.costs = costs
        self.rules = rules
        self.simulation = Simulation()
        self.store = Store(self.simulation, parameters)
        self.files = FileSystem(self.simulation, parameters)
        self.directory = Directory(self.simulation, self.files, num_ranks * parameters.parts)
