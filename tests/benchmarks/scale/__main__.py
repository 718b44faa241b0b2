"""``python -m tests.benchmarks.scale``: measure a commit, simulate many ranks, print tables, write JSON."""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from tests.benchmarks.machine import describe_machine, describe_versions
from tests.benchmarks.scale.costs import CostModel
from tests.benchmarks.scale.measured import Measured
from tests.benchmarks.scale.measuring import measure, store_service_secs
from tests.benchmarks.scale.parameters import Parameters
from tests.benchmarks.scale.report import markdown
from tests.benchmarks.scale.run import Row, simulate
from tests.benchmarks.scale.size import Size

RANKS = (8, 64, 512, 2048, 4096, 16384)
SIZES = ((64, 64), (256, 256), (1024, 1024), (64, 8), (512, 8), (2048, 8), (16384, 64))  # ranks, shards
_STORE_REQUESTS = 40_000


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    parameters = Parameters(**{field.name: getattr(options, field.name) for field in fields(Parameters)})
    if options.measured is not None:
        known = json.loads(options.measured.read_text())
        measured = [Measured.from_json(one) for one in known["measured"]]
        service_secs = known["parameters"]["store_service_secs"]
    else:
        _say("measuring the store's server")
        service_secs = store_service_secs(options.store_requests)
        sizes = [Size(ranks, parameters.tensors, shards, parameters.objects) for ranks, shards in options.measure]
        measured = measure(sizes, options.directory, _say)
    if parameters.store_service_secs is None:
        parameters = replace(parameters, store_service_secs=service_secs)
    model = CostModel(measured)
    rows: list[Row] = []
    for num_ranks in options.ranks:
        _say(f"simulating {num_ranks:,} ranks")
        rows.append(simulate(parameters, model, num_ranks))
    print("\n".join(markdown(rows)))
    if options.out is not None:
        options.out.write_text(
            json.dumps(_document(parameters, measured, model, rows, options.directory), indent=1) + "\n"
        )


def _document(
    parameters: Parameters, measured: Sequence[Measured], model: CostModel, rows: Sequence[Row], directory: Path
) -> dict[str, Any]:
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": asdict(describe_machine(directory, 0.0)),
        "versions": asdict(describe_versions()),
        "parameters": asdict(parameters),
        "measured": [asdict(one) for one in measured],
        "lines": {
            kind: {name: asdict(line) for name, line in getattr(model, kind).items()}
            for kind in ("commit", "parse", "stock")
        },
        "rows": [asdict(row) for row in rows],
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.scale", description=__doc__)
    parser.add_argument("--ranks", type=_numbers, default=RANKS, metavar="N,...", help="simulate so many ranks")
    parser.add_argument(
        "--measure",
        type=_sizes,
        default=SIZES,
        metavar="RANKS:SHARDS,...",
        help="measure a commit of so many ranks, over so many of which the state is sharded",
    )
    parser.add_argument("--measured", type=Path, metavar="FILE", help="take what --out of an earlier run says instead")
    parser.add_argument("--store-requests", type=int, default=_STORE_REQUESTS, metavar="N", help="measure so many")
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()), help="measure in it")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write all figures there, as JSON")
    for field in fields(Parameters):
        kind = int if isinstance(field.default, int) else float
        name = "--" + field.name.replace("_", "-")
        parser.add_argument(name, type=kind, default=field.default, metavar="X", help=field.metadata["what"])
    return parser


def _numbers(text: str) -> tuple[int, ...]:
    numbers = tuple(map(int, text.split(",")))
    if min(numbers) < 2:
        raise argparse.ArgumentTypeError("at least 2 ranks")
    return numbers


def _sizes(text: str) -> tuple[tuple[int, int], ...]:
    sizes = [tuple(map(int, one.split(":"))) for one in text.split(",")]
    for ranks, shards in sizes:
        if ranks % shards:
            raise argparse.ArgumentTypeError(f"{ranks} ranks are no multiple of {shards} shards")
    return tuple((ranks, shards) for ranks, shards in sizes)


if __name__ == "__main__":
    main()
