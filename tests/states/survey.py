"""Every trial of the corpus on today's code, in children, so that one that crashes does not end the survey.

python -m tests.states.survey [--only WORD] [--format torch]      # one JSON line for each trial
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch

from tests.states.corpus import CORPUS, State
from tests.states.trial import FORMATS, WAYS, Bench

_TIMEOUT_SECS = 150


def survey(states: Sequence[State], formats: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield a record of each trial. A child that ends early is replaced, and goes on behind the state that ended it."""
    dangerous = [state for state in states if state.is_dangerous]
    for file_format in formats:
        yield from _in_children([state for state in states if not state.is_dangerous], file_format)
        for state in dangerous:
            yield from _in_children([state], file_format)


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
        yield {"state": name, "kind": CORPUS[name].kind, "format": file_format, "way": "any", "problems": [ended]}
        rest = [state for state in rest[1:] if state.name not in begun]


def _child(states: Sequence[State], file_format: str) -> Iterator[dict[str, Any]]:
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reader)
        try:
            with os.fdopen(writer, "w") as out:
                _work(states, file_format, out)
            os._exit(0)
        finally:
            os._exit(3)
    os.close(writer)
    with os.fdopen(reader) as lines:
        for line in lines:
            yield json.loads(line)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status:
        how = signal.Signals(-status).name if status < 0 else f"exit code {status}"
        yield {"ended": f"the process was ended by {how}"}


def _work(states: Sequence[State], file_format: str, out: Any) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    with tempfile.TemporaryDirectory() as directory:
        bench, world = None, None
        for state in states:
            out.write(json.dumps({"begin": state.name}) + "\n")
            out.flush()
            signal.alarm(_TIMEOUT_SECS)
            record = {"state": state.name, "kind": state.kind, "format": file_format}
            try:
                if bench is None:
                    world = state.world()
                    world.__enter__()
                    bench = Bench(file_format, os.path.join(directory, "run"))
                for way in WAYS:
                    started = time.monotonic()
                    problems = bench.trial(state, way)
                    out.write(
                        json.dumps({**record, "way": way, "problems": problems, "secs": time.monotonic() - started})
                        + "\n"
                    )
            except Exception as error:  # noqa: BLE001  # of the corpus itself
                out.write(json.dumps({**record, "way": "corpus", "problems": [f"corpus: {error!r}"[:300]]}) + "\n")
            out.flush()
        signal.alarm(0)
        with suppress(Exception):
            if bench is not None:
                bench.close()
            if world is not None:
                world.__exit__(None, None, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="only states whose name or kind has this in it")
    parser.add_argument("--format", choices=FORMATS, action="append", help="only this one; may be given several times")
    options = parser.parse_args()
    torch.set_num_threads(1)  # a child cannot use the threads that its parent has made
    chosen = [state for state in CORPUS.values() if options.only in state.name or options.only in state.kind]
    for record in survey(chosen, options.format or FORMATS):
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    sys.exit(main())
