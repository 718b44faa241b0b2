"""Runs a function of the tests in a child process of its own, with a limit of descriptors if asked, and returns its JSON."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_TIMEOUT_SECS = 150


def run(target: str, *args: Any, nofile: int | None = None) -> Any:
    """``target`` is ``module:function``; its result comes back as JSON. Raises with the child's output if it fails."""
    command = [sys.executable, "-m", "tests.staging.child", target, json.dumps(args), str(nofile or 0)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=_TIMEOUT_SECS)
    finally:
        _kill_group(process)
    assert process.returncode == 0, f"child exited with {process.returncode}:\n{output}\n{errors}"
    return json.loads(output.splitlines()[-1])


def _kill_group(process: subprocess.Popen[str]) -> None:
    """Whatever a child that failed may have left running."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main() -> None:
    target, args, nofile = sys.argv[1:]
    if int(nofile):
        resource.setrlimit(resource.RLIMIT_NOFILE, (int(nofile), int(nofile)))
    module, name = target.split(":")
    result = getattr(importlib.import_module(module), name)(*json.loads(args))
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
