"""One rank of a job that the demo starts.

Run as ``torchrun ... -m stager.demo.ranks.rank --config FILE --run-dir DIR --checkpoints DIR --events FIFO``.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from stager.demo.ranks.config import RanksConfig
from stager.demo.ranks.events import RankWriter
from stager.demo.ranks.training import leave, train_rank


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of each rank that torchrun starts."""
    parser = argparse.ArgumentParser(prog="torchrun -m stager.demo.ranks.rank", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="a RanksConfig as JSON")
    parser.add_argument("--run-dir", type=Path, required=True, help="where losses.jsonl and final.pt go")
    parser.add_argument("--checkpoints", type=Path, required=True, help="save to, and resume from, this directory")
    parser.add_argument("--events", required=True, help="the FIFO that the demo reads")
    arguments = parser.parse_args(argv)

    config = RanksConfig.model_validate_json(arguments.config.read_bytes())
    events = RankWriter(arguments.events, int(os.environ["RANK"]))
    dist.init_process_group("gloo")
    train_rank(config, arguments.run_dir, arguments.checkpoints, events)
    dist.destroy_process_group()
    events.close()
    leave()


if __name__ == "__main__":
    main()
