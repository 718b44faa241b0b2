"""Every trial of the corpus on today's code, in children, so that one that crashes does not end the survey.

python -m tests.states.survey [--only WORD] [--format torch]      # one JSON line for each trial
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from tests.states.corpus import CORPUS, State
from tests.states.trial import FORMATS, WAYS, Bench

ENDED = "all"
"""The way of a record of a trial that ended its process."""

_TIMEOUT_SECS = 150


def survey(states: Sequence[State], formats: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield a record of each trial. A child that ends early is replaced, and goes on behind the state that ended it."""
    groups: dict[tuple[bool, object], list[State]] = {}
    for state in states:
        groups.setdefault((state.is_dangerous, state.world), []).append(state)
    for file_format in formats:
        for group in groups.values():
            yield from _in_children(group, file_format)


def _in_children(states: Sequence[State], file_format: str) -> Iterator[dict[str, Any]]:
    rest = list(states)
    while rest:
        begun, ended = [], None
        for record in _child(rest, file_format):
            if "begin" in record:
                begun.append(record["begin"])
            elif "ended" in record:
                ended = record["ended"]
            else:
                yield record
        if not ended:
            break
        name = begun[-1] if begun else rest[0].name
        yield {"state": name, "kind": CORPUS[name].kind, "format": file_format, "way": ENDED, "problems": [ended]}
        rest = [state for state in rest[1:] if state.name not in begun]


def _child(states: Sequence[State], file_format: str) -> Iterator[dict[str, Any]]:
    """Yield the records of a child's trials, {"begin": name} before each state, and {"ended": how} if it ended early."""
    reader, writer = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:  # a child that crashes cannot remove it
        pid = os.fork()
        if not pid:
            os.close(reader)
            try:
                _work(states, file_format, directory, writer)
                os._exit(0)
            finally:
                os._exit(3)
        os.close(writer)
        with os.fdopen(reader) as lines:
            yield from map(json.loads, lines)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status:
        how = signal.Signals(-status).name if status < 0 else f"exit code {status}"
        yield {"ended": f"the process was ended by {how}"}


def _work(states: Sequence[State], file_format: str, directory: str, writer: int) -> None:
    """In a child: try all states in one world, and write the records into the pipe."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    tempfile.tempdir = directory  # what the states make there goes with it
    with os.fdopen(writer, "w", buffering=1) as out, states[0].world():
        bench = Bench(file_format, os.path.join(directory, "run"))
        for state in states:
            print(json.dumps({"begin": state.name}), file=out)
            signal.alarm(_TIMEOUT_SECS)
            record = {"state": state.name, "kind": state.kind, "format": file_format}
            try:
                for way in WAYS:
                    print(json.dumps({**record, "way": way, "problems": bench.trial(state, way)}), file=out)
            except Exception as error:  # noqa: BLE001  # of the corpus itself
                print(json.dumps({**record, "way": ENDED, "problems": [f"corpus: {error!r:.300}"]}), file=out)
        signal.alarm(0)
        bench.close()


def print_records(names: Sequence[str], file_format: str) -> None:
    """Print a JSON line for each trial of these states."""
    torch.set_num_threads(1)  # a child cannot use the threads that its parent has made
    for record in survey([CORPUS[name] for name in names], [file_format]):
        print(json.dumps(record), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="only states whose name or kind has this in it")
    parser.add_argument("--format", choices=FORMATS, action="append", help="only this one; may be given several times")
    options = parser.parse_args()
    chosen = [one.name for one in CORPUS.values() if options.only in one.name or options.only in one.kind]
    for file_format in options.format or FORMATS:
        print_records(chosen, file_format)


if __name__ == "__main__":
    main()
