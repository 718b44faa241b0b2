"""``python -m tests.benchmarks``: stager beside the other ways to checkpoint, in one run.

The benchmark belongs to the source: an installed wheel does not have it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Annotated

import typer

from stager.cli.console import print_error, stderr, stdout
from tests.benchmarks.cases import CASES
from tests.benchmarks.options import Options
from tests.benchmarks.peers import PEERS
from tests.benchmarks.program import execute

_EXIT_USAGE = 2


def bench(
    rounds: Annotated[int, typer.Option(min=1, help="Passes over the peers.")] = 3,
    scale: Annotated[float, typer.Option(min=0.0001, help="Size of the states; 1 is the published one.")] = 1.0,
    case: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Only this case; may be repeated. 'list' prints them.")
    ] = None,
    peer: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Only this peer; may be repeated. 'list' prints them.")
    ] = None,
    directory: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Measure in this directory; default: the temporary one.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write results.json, results.md and a picture per case.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the states' values and of the order of the peers.")] = 0,
    saves: Annotated[int, typer.Option(min=2, help="Later saves of each peer in each pass.")] = 4,
    deadline: Annotated[float, typer.Option(min=1, help="Seconds for one peer in one pass; then it is killed.")] = 300,
    cap: Annotated[float, typer.Option(min=0, help="Seconds of saving after which two later saves are enough.")] = 60,
    memory: Annotated[bool, typer.Option(help="Also measure memory, in a pass of its own.")] = True,
    pairs: Annotated[int, typer.Option(min=1, help="Pairs of stretches of the training loop in each pass.")] = 20,
    stretch: Annotated[int, typer.Option(min=1, help="Training steps in a stretch.")] = 4,
    soak_saves: Annotated[int, typer.Option(min=2, help="Saves of the soak case.")] = 2000,
) -> None:
    """Measure stager beside the other ways to checkpoint. Hours at full size; see docs/benchmarks.md."""
    cases = _chosen("case", case, CASES)
    peers = _chosen("peer", peer, PEERS)
    options = Options(
        directory=_existing(directory),
        out=out,
        rounds=rounds,
        scale=scale,
        saves=saves,
        cases=cases,
        peers=peers,
        seed=seed,
        cap_secs=cap,
        deadline_secs=deadline,
        memory=memory,
        pairs=pairs,
        stretch_steps=stretch,
        soak_saves=soak_saves,
    )
    execute(options, stdout(), stderr())


def _chosen(what: str, wanted: list[str] | None, known: Collection[str]) -> tuple[str, ...]:
    """Exits when a name is unknown, or when the names were asked for."""
    if wanted == ["list"]:
        stdout().print("\n".join(known))
        raise typer.Exit
    unknown = [name for name in wanted or () if name not in known]
    if unknown:
        print_error(f"there is no {what} {unknown[0]!r}; there are: {', '.join(known)}")
        raise typer.Exit(_EXIT_USAGE)
    return tuple(wanted or ())


def _existing(directory: Path | None) -> Path:
    if directory is None:
        return Path(tempfile.gettempdir())
    directory.mkdir(parents=True, exist_ok=True)
    return directory


if __name__ == "__main__":
    typer.run(bench)
