"""One rank of a job that the demo starts.

Run as ``python -m stager.demo.rank --config FILE --run-dir DIR --checkpoints DIR --events FIFO``, or so by torchrun.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from torch.distributed import is_torchelastic_launched

from stager.demo.config import DemoConfig
from stager.demo.events import EventWriter
from stager.demo.sharded import leave, train_rank


def main(argv: Sequence[str] | None = None) -> None:
    """Train, and report to the demo."""
    parser = argparse.ArgumentParser(prog="python -m stager.demo.rank", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="a DemoConfig as JSON")
    parser.add_argument("--run-dir", type=Path, required=True, help="where losses.jsonl and final.pt go")
    parser.add_argument("--checkpoints", required=True, help="save to, and resume from, this directory")
    parser.add_argument("--events", required=True, help="the FIFO that the demo reads")
    arguments = parser.parse_args(argv)

    config = DemoConfig.model_validate_json(arguments.config.read_bytes())
    events = EventWriter(arguments.events, int(os.environ.get("RANK", "0")))
    sharded = is_torchelastic_launched()
    train_rank(config, sharded, arguments.run_dir, arguments.checkpoints, events.send)
    events.close()
    if sharded:
        leave()


if __name__ == "__main__":
    main()
