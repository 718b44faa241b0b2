"""The program behind ``python -m tests.benchmarks``: run, print each case as it is done, write the files."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from rich.console import Console
from rich.status import Status

from tests.benchmarks.chart import draw_all
from tests.benchmarks.options import Options
from tests.benchmarks.report import print_case, print_criteria, write_markdown
from tests.benchmarks.results import CaseResults, Results
from tests.benchmarks.run import run


def execute(options: Options, out: Console, err: Console) -> Results:
    """``out`` gets the tables; ``err`` what is being done."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C does: ends what is running first
    with Status("starting", console=err) as status:

        def progress(text: str) -> None:
            if err.is_terminal:
                status.update(text)
            else:
                print(text, file=sys.stderr, flush=True)

        def on_case(results: Results, case: CaseResults) -> None:
            print_case(out, case)
            if options.out is not None:  # after every case: a run takes long, and may be stopped
                write_files(results, options.out)

        results = run(options, progress, on_case)
    print_criteria(out, results)
    return results


def write_files(results: Results, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    results.save(directory / "results.json")
    write_markdown(results, directory / "results.md", draw_all(results, directory))
