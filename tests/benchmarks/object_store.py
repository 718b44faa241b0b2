"""``python -m tests.benchmarks.object_store``: to an object store and back, beside its client and s3torchconnector's DCP.

Each leg has a server of its own kind, ministack on the loopback interface, which is new for each, and is a process of its
own; what is measured begins after its imports, with the state in its memory.

    obstore             the same bytes by ``obstore.put``, 32 MiB each, sixteen on the way; nothing is hashed or committed;
                        back by ``obstore.get_range``, 8 MiB each, as many threads
    stager              ``save()`` until it is committed, two workers; ``load(into=)``, each hash checked
    s3torchconnector    ``dcp.save()`` with ``S3StorageWriter`` and four threads, whose files are not hashed; ``dcp.load()``

Memory is measured in a round of its own: how much more the process and all below it held at the peak (shared pages counted
once, PSS) than before, over the bytes of the state. stager has two buffers, each one time the state. Times are
medians over the other rounds, ratios medians of the ratios within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import obstore
import torch
import torch.distributed.checkpoint as dcp
from obstore.store import S3Store

from stager import Checkpointer
from tests.benchmarks.footprint import pss_bytes, tree_pss_bytes
from tests.benchmarks.launch import ROOT
from tests.benchmarks.machine import describe_machine, describe_versions
from tests.object_stores.servers import BUCKET, environment, serving

_INTERVAL_SECS = 0.05
_TENSOR_BYTES = 32 << 20
_PUT_BYTES, _GET_BYTES = 32 << 20, 8 << 20
_AT_ONCE = 16
_URL = f"s3://{BUCKET}/run"

State = dict[str, torch.Tensor]


def _state(nbytes: int, value: Callable[[int], torch.Tensor]) -> State:
    each = min(nbytes, _TENSOR_BYTES) // 4
    return {f"layers.{number}.weight": value(each) for number in range(nbytes // (4 * each))}


def _flat(state: Mapping[str, torch.Tensor], nbytes: int) -> list[memoryview]:
    """The bytes of a state in pieces of at most so many."""
    whole = [memoryview(tensor.numpy()).cast("B") for tensor in state.values()]
    return [one[start : start + nbytes] for one in whole for start in range(0, len(one), nbytes)]


def _store() -> S3Store:
    return S3Store.from_url(_URL, endpoint=os.environ["AWS_ENDPOINT_URL"], client_options={"allow_http": True})


def _obstore_save(state: State) -> None:
    store = _store()
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        pieces = enumerate(_flat(state, _PUT_BYTES))
        for done in [
            threads.submit(obstore.put, store, f"{number:06}", piece, use_multipart=False) for number, piece in pieces
        ]:
            done.result()


def _obstore_load(state: State) -> None:
    store = _store()
    per_put = _PUT_BYTES // _GET_BYTES

    def get(number: int, piece: memoryview) -> None:
        key, start = f"{number // per_put:06}", number % per_put * _GET_BYTES
        piece[:] = memoryview(obstore.get_range(store, key, start=start, length=len(piece)))

    with ThreadPoolExecutor(_AT_ONCE) as threads:
        pieces = enumerate(_flat(state, _GET_BYTES))
        for done in [threads.submit(get, number, piece) for number, piece in pieces]:
            done.result()


def _stager_save(ckpt: Checkpointer, state: State) -> None:
    ckpt.save(1, state).upload_completion.result()


def _stager_load(state: State) -> None:
    with Checkpointer(_URL, read_only=True) as ckpt:
        assert ckpt.load(into=state) is not None


def _connector_client() -> Any:
    from s3torchconnector import S3ClientConfig
    from s3torchconnector._s3client import S3Client

    endpoint = os.environ["AWS_ENDPOINT_URL"]
    return S3Client("us-east-1", endpoint=endpoint, s3client_config=S3ClientConfig(force_path_style=True))


def _connector_save(state: State) -> None:
    from s3torchconnector.dcp import S3StorageWriter
    from s3torchconnector.dcp.s3_file_system import S3FileSystem

    writer = S3StorageWriter("us-east-1", _URL, thread_count=4)
    writer.fs = S3FileSystem("us-east-1", s3_client=_connector_client())  # the writer takes no endpoint
    dcp.save(state, storage_writer=writer, no_dist=True)


def _connector_load(state: State) -> None:
    from s3torchconnector.dcp import S3StorageReader
    from s3torchconnector.dcp.s3_file_system import S3FileSystem

    reader = S3StorageReader("us-east-1", _URL)
    reader.fs = S3FileSystem("us-east-1", s3_client=_connector_client())
    dcp.load(state, storage_reader=reader, no_dist=True)


_SAVES = {"obstore": _obstore_save, "s3torchconnector": _connector_save}
_LOADS = {"obstore": _obstore_load, "stager": _stager_load, "s3torchconnector": _connector_load}
LEGS = ("obstore", "stager", "s3torchconnector")


def _checksum(state: Mapping[str, torch.Tensor]) -> float:
    return float(sum(tensor.double().sum() for tensor in state.values()))


def _be_leg(name: str, phase: str, nbytes: int) -> dict[str, float]:
    """In the process of a leg."""
    torch.manual_seed(0)
    if phase == "load":
        state = _state(nbytes, torch.zeros)
        base = pss_bytes(os.getpid())
        started = time.perf_counter()
        _LOADS[name](state)
        return {"secs": time.perf_counter() - started, "base_bytes": base, "checksum": _checksum(state)}
    state = _state(nbytes, torch.rand)
    base = pss_bytes(os.getpid())
    if name != "stager":
        started = time.perf_counter()
        _SAVES[name](state)
        return {"secs": time.perf_counter() - started, "base_bytes": base, "checksum": _checksum(state)}
    with Checkpointer(_URL, config={"workers": {"count": 2}}) as ckpt:
        ckpt.warmup(state)
        started = time.perf_counter()
        _stager_save(ckpt, state)
        secs = time.perf_counter() - started
    return {"secs": secs, "base_bytes": base, "checksum": _checksum(state)}


def _run_phase(name: str, phase: str, nbytes: int, url: str, *, watch_memory: bool) -> dict[str, float]:
    options = ["--leg", name, "--phase", phase, "--size", str(nbytes)]
    command = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.object_store", *options]
    peak = 0
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment(url)}
    ) as process:
        while watch_memory and process.poll() is None:
            peak = max(peak, tree_pss_bytes(process.pid))
            time.sleep(_INTERVAL_SECS)
        assert process.stdout is not None
        said = process.stdout.read()
        process.wait()
    if process.returncode:
        raise RuntimeError(f"{phase} of {name} ended with exit code {process.returncode}")
    result: dict[str, float] = json.loads(said.splitlines()[-1])
    return result | {"grown": (peak - result["base_bytes"]) / nbytes if watch_memory else 0.0}


def _run_leg(name: str, nbytes: int, directory: Path, *, watch_memory: bool) -> dict[str, dict[str, float]]:
    with serving("ministack", directory) as server:
        run = partial(_run_phase, name, nbytes=nbytes, url=server.url, watch_memory=watch_memory)
        found = {phase: run(phase) for phase in ("save", "load")}
    assert found["save"]["checksum"] == found["load"]["checksum"], f"{name} loads other values than it has saved"
    return found


def measure(nbytes: int, rounds: int, directory: Path) -> dict[str, Any]:
    """Measure all legs in turn."""
    found: dict[str, list[dict[str, dict[str, float]]]] = {name: [] for name in LEGS}
    for number in range(rounds):
        for name in LEGS[number % len(LEGS) :] + LEGS[: number % len(LEGS)]:
            found[name].append(_run_leg(name, nbytes, directory, watch_memory=False))
    memory = {name: _run_leg(name, nbytes, directory, watch_memory=True) for name in LEGS}

    def figures(name: str, phase: str) -> dict[str, Any]:
        secs = [one[phase]["secs"] for one in found[name]]
        ratios = [
            one[phase]["secs"] / put[phase]["secs"] for one, put in zip(found[name], found["obstore"], strict=True)
        ]
        return {
            "secs": statistics.median(secs),
            "range_secs": [min(secs), max(secs)],
            "secs / obstore": statistics.median(ratios),
            "memory / state": memory[name][phase]["grown"],
        }

    return {
        "nbytes": nbytes,
        "machine": asdict(describe_machine(directory, min(1.0, nbytes / (4 << 30)))),
        "versions": asdict(describe_versions()),
        "legs": {name: {phase: figures(name, phase) for phase in ("save", "load")} for name in LEGS},
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=4096, help="size of the state")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write a JSON file")
    for hidden in ("--leg", "--phase", "--size"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.leg is not None:
        print(json.dumps(_be_leg(options.leg, options.phase, int(options.size))))
        return {}
    with tempfile.TemporaryDirectory(prefix="stager-object-store-") as directory:
        result = measure(options.mib << 20, options.rounds, Path(directory))
    for name, phases in result["legs"].items():
        for phase, one in phases.items():
            low, high = one["range_secs"]
            print(
                f"{name:18} {phase} {one['secs']:7.2f} s ({low:.2f} to {high:.2f}), {one['secs / obstore']:.2f} of obstore, "
                f"memory {one['memory / state']:.2f} of the state"
            )
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main()
