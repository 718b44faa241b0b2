"""Runs a function of the tests in a child process of its own, with a limit of descriptors if asked, and returns its JSON."""

from __future__ import annotations

import importlib
import json
import os
import resource
import tempfile
import warnings
from pathlib import Path
from typing import Any

from tests import fork_server

ROOT = fork_server.ROOT
_TIMEOUT_SECS = 150


def run(target: str, *args: Any, nofile: int | None = None) -> Any:
    """``target`` is ``module:function``; its result comes back as JSON. Raises with the child's output if it fails."""
    server = fork_server.shared()
    module = target.partition(":")[0]
    with tempfile.TemporaryDirectory() as directory:
        output, result = Path(directory, "output"), Path(directory, "result.json")
        arguments = [target, json.dumps(args), nofile, str(result)]
        pid = server.start(
            f"{__name__}:answer",
            arguments,
            stdout=output,
            stderr=output,
            environment=environment(),
            modules=[module],
        )
        try:
            code = server.wait(pid, _TIMEOUT_SECS)
        finally:
            server.kill(pid)  # whatever a child that failed may have left running
        assert code == 0, f"child exited with {code}:\n{output.read_text()}"
        return json.loads(result.read_text())


def environment() -> dict[str, str]:
    """Of this moment, for ranks on a machine that other tests keep busy: a niced worker would wait for all of them."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "STAGER_WORKERS__NICE": "0"}


def answer(target: str, args: str, nofile: int | None, result: str) -> None:
    """In the child."""
    warnings.simplefilter("ignore")  # as PYTHONWARNINGS says: this interpreter began before it was set
    if nofile is not None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (nofile, nofile))
    module, name = target.split(":")
    value = getattr(importlib.import_module(module), name)(*json.loads(args))
    Path(result).write_text(json.dumps(value))
