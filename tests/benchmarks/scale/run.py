"""From parameters and costs to figures: the first agreement, a later save, and the same save of stock DCP."""

from __future__ import annotations

import random
from dataclasses import dataclass

from stager.ranks.messages import LeafEntry
from stager.workers.checkpoint.storage.posix.files import DOCUMENT_BYTES
from stager.workers.gc_pause import no_collection
from tests.benchmarks.scale.agreement import Kind, settle
from tests.benchmarks.scale.costs import CostModel
from tests.benchmarks.scale.filesystem import Call
from tests.benchmarks.scale.measured import Commit, Parse
from tests.benchmarks.scale.parameters import Parameters
from tests.benchmarks.scale.saving import Save
from tests.benchmarks.scale.simulation import Actor, Steps
from tests.benchmarks.scale.size import Size
from tests.benchmarks.scale.stock import StockSave, stock_save
from tests.benchmarks.scale.store import SimulatedGroup
from tests.benchmarks.scale.world import World


@dataclass(frozen=True, slots=True)
class AgreementFigures:
    """Attributes:
    requests, busiest_requests: of all ranks, and of the one that sends most, to the store.
    store_bytes: keys and messages.
    store_load: share of the time that the store's server works, from the first rank's coming to the end.
    secs: from the arrival of the last rank until the last one knows.
    """

    requests: int
    busiest_requests: int
    store_bytes: int
    store_load: float
    secs: float


@dataclass(frozen=True, slots=True)
class SaveFigures:
    """A later save.

    Attributes:
        requests, busiest_requests, store_bytes: as above; none of a training thread.
        store_load: from the first rank's having written its part to the end.
        calls: to the metadata server, of all ranks.
        committer_calls: of the one process that commits; ``listings`` and ``listed`` are names in all of them.
        commit_secs: from its seeing all receipts to the rename.
        tail_secs: from the last rank's last byte to the last rank's ``upload_completion``.
        failed_ranks: did not hear of it within ``timeout_secs``.
    """

    requests: int
    busiest_requests: int
    store_bytes: int
    store_load: float
    calls: int
    committer_calls: int
    listings: int
    listed: int
    commit_secs: float
    tail_secs: float
    failed_ranks: int


@dataclass(frozen=True, slots=True)
class Row:
    """Attributes:
    measured: commits were measured with as many rows and names; else the costs are extrapolated.
    commit, parse: of the one process that commits, and of each that reads the manifest.
    readable: the manifest is not larger than what its readers take.
    """

    ranks: int
    rows: int
    measured: bool
    commit: Commit
    parse: Parse
    readable: bool
    agreement: AgreementFigures
    save: SaveFigures
    stock: StockSave


def simulate(parameters: Parameters, model: CostModel, num_ranks: int) -> Row:
    size = Size.of(parameters, num_ranks)
    costs, commit = model.at(size, parameters.parts), model.commit_at(size)
    with no_collection():
        agreement = _agreement(World(parameters, num_ranks, costs))
        save = _save(World(parameters, num_ranks, costs))
    return Row(
        ranks=num_ranks,
        rows=size.rows,
        measured=model.reaches(size),
        commit=commit,
        parse=model.parse_at(size),
        readable=commit.manifest_bytes <= DOCUMENT_BYTES,
        agreement=agreement,
        save=save,
        stock=stock_save(parameters, num_ranks, model.stock_at(size)),
    )


def _starts(parameters: Parameters, num_ranks: int) -> list[float]:
    chance = random.Random(parameters.seed)
    return [chance.uniform(0.0, parameters.skew_secs) for _ in range(num_ranks)]


# -- the agreement -----------------------------------------------------------------------------------------------


def kinds_of(parameters: Parameters) -> list[Kind]:
    """Objects that are called alike, and are alike, on the ranks of a kind."""
    names = [[f"stage_{kind}.value_{number}" for number in range(parameters.plain)] for kind in range(parameters.kinds)]
    return [Kind.of([LeafEntry(name, "object") for name in some], dict.fromkeys(some, f"{0:032x}")) for some in names]


def _agreement(world: World) -> AgreementFigures:
    parameters, num_ranks, kinds = world.parameters, world.num_ranks, kinds_of(world.parameters)[: world.num_ranks]
    starts = _starts(parameters, num_ranks)
    actors = [Actor(start) for start in starts]
    num_shards = parameters.num_shards(num_ranks)

    def one(rank: int) -> Steps[None]:
        group = SimulatedGroup(world.store, actors[rank], world.wait_poll_secs)
        spreads = [f"{rank % num_shards:032x}"]
        yield from settle(group, rank, num_ranks, kinds, kinds[rank * len(kinds) // num_ranks], spreads)

    for rank, start in enumerate(starts):
        world.simulation.start(one(rank), start)
    world.simulation.run()
    end = max(actor.now for actor in actors)
    return AgreementFigures(
        requests=world.store.num_requests,
        busiest_requests=max(actor.num_requests for actor in actors),
        store_bytes=world.store.nbytes,
        store_load=world.store.server.busy_secs / (end - min(starts)),
        secs=end - max(starts),
    )


# -- a later save ------------------------------------------------------------------------------------------------


def _save(world: World) -> SaveFigures:
    starts = [[start] * world.parameters.parts for start in _starts(world.parameters, world.num_ranks)]
    save = Save(world, starts)
    world.simulation.run()
    ended = save.ending.ended_at
    end = max(trainer.now for trainer in save.ending.trainers.values())
    assert save.committer is not None
    return SaveFigures(
        requests=world.store.num_requests,
        busiest_requests=max(trainer.num_requests for trainer in save.ending.trainers.values()),
        store_bytes=world.store.nbytes,
        store_load=world.store.server.busy_secs / (end - save.first_at),
        calls=world.files.calls.total(),
        committer_calls=save.committer.num_calls,
        listings=world.files.calls[Call.LIST],
        listed=world.files.num_listed,
        commit_secs=save.commit_secs,
        tail_secs=end - save.written_at,
        failed_ranks=sum(moment is None for moment in ended.values()),
    )
