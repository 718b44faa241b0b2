"""Takes one wait at a time out of the code that copies from devices, and runs the device tests: do they see it?

    python -m tests.accelerator.mutations

Each mutant is a copy of the source tree with one line changed: a wait is gone, or copies are issued on another stream than
that which is waited for. Its tests run in every mode of the simulated accelerator until one fails. A mutant that no test
catches is printed, and the exit code is 1.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path(__file__).parents[2]
_FILES = (
    "workers/device/streams.py",
    "stager/snapshot/device_copies.py",
    "stager/snapshot/copying.py",
    "stager/snapshot/guard.py",
    "stager/loading/reading/device_fill.py",
    "stager/torch_api/staging/default.py",
    "stager/torch_api/staging/state_dict_stager.py",
    "workers/offload/copier.py",
)
_WAIT = re.compile(
    r"^(?P<indent>\s+)(?P<call>[\w.\[\]()]*\.(synchronize|wait_stream|set_stream|wait_event|_wait)\(.*\))(\s*#.*)?$"
)
_ON_STREAMS = "streams.stream()"  # in a with statement: the copies are issued on the streams that are waited for
_MODES = "late,ahead,behind,early,seed 1,seed 2"
_TESTS = ("copies", "loading", "stagers", "checkpointer", "training")


@dataclass(frozen=True)
class Mutant:
    """One line without its wait."""

    file: str
    line: int
    call: str


def mutants() -> list[Mutant]:
    """Find the lines that wait, or that choose the stream that is waited for."""
    found = []
    for file in _FILES:
        for number, text in enumerate((_ROOT / file).read_text().splitlines(), 1):
            if match := _WAIT.match(text):
                found.append(Mutant(file, number, match["call"]))
            elif _ON_STREAMS in text and "with " in text:
                found.append(Mutant(file, number, _ON_STREAMS))
    return found


def copy_with(mutant: Mutant, to: Path) -> None:
    """Copy the source tree, with the mutant's line changed into one that does nothing."""
    ignored = shutil.ignore_patterns("__pycache__", ".venv", ".git", "runs", ".hypothesis", ".*_cache")
    shutil.copytree(_ROOT, to, symlinks=True, ignore=ignored)
    shutil.rmtree(to / "tests" / "accelerator")
    (to / "tests" / "accelerator").symlink_to(_ROOT / "tests" / "accelerator")  # not to be built for each mutant
    path = to / mutant.file
    lines = path.read_text().splitlines(keepends=True)
    changed = lines[mutant.line - 1]
    if mutant.call == _ON_STREAMS:
        nothing = "__import__('contextlib').nullcontext()"
        lines[mutant.line - 1] = re.sub(r"[\w.]*streams\.stream\(\)", nothing, changed)
    else:
        lines[mutant.line - 1] = changed[: len(changed) - len(changed.lstrip())] + "pass\n"
    path.write_text("".join(lines))


def caught_by(tree: Path) -> str | None:
    """Return the first test that fails, with its mode; None if all pass in every mode."""
    environment = {**os.environ, "STAGER_SIMULATED": _MODES, "PYTHONPATH": str(tree), "STAGER_WORKERS__COUNT": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-o", "timeout=60"]
    command += [f"tests/device/test_{name}.py" for name in _TESTS]
    ended = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode == 0:
        return None
    failed = re.findall(r"^(?:FAILED|ERROR) (\S.*?)(?: - .*)?$", ended.stdout, re.MULTILINE)
    return str(failed[0]) if failed else "a test that hung"


def main() -> int:
    """Print each mutant and what caught it."""
    missed = 0
    found = mutants()
    for mutant in found:
        with tempfile.TemporaryDirectory() as directory:
            tree = Path(directory) / "tree"
            copy_with(mutant, tree)
            caught = caught_by(tree)
        missed += caught is None
        print(f"{mutant.file}:{mutant.line} {mutant.call}: {caught or 'NOT CAUGHT'}", flush=True)
    print(f"{len(found)} waits, {missed} not caught")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
