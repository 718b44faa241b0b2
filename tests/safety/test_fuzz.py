"""Hostile checkpoints, a few hundred from a seed; ``python -m tests.safety.fuzz`` makes as many as are wanted."""

from __future__ import annotations

import io
import pickle
import struct
import subprocess
import sys
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from stager.loading.dcp.stock_metadata import parse_stock_metadata
from stager.loading.pickles.archive_check import check_archive
from stager.loading.pickles.pickle_check import check_pickle
from stager.loading.pickles.unpickle import unpickle
from stager.workers.errors import CorruptCheckpointError, UnloadableError, UnsafePickleError
from tests.safety.fuzz import Findings, Fuzzer, quiet
from tests.safety.mutate import HOSTILE_PICKLES
from tests.states import everything


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Fuzzer:
    return Fuzzer(tmp_path_factory.mktemp("fuzz"))


def test_what_is_spoiled_is_sound_before(fuzzer: Fuzzer) -> None:
    findings = fuzzer.open_unspoiled()
    assert not findings.problems
    assert {outcome.partition(": ")[2] for outcome in findings.outcomes} == {"accepted"}


def test_hostile_checkpoints_run_no_code_lead_nowhere_and_raise_our_errors(fuzzer: Fuzzer) -> None:
    findings = Findings()
    for number in range(160):
        fuzzer.attempt(20260, number, findings)
    assert not findings.problems
    kinds = Counter(outcome.partition(": ")[2] for outcome in findings.outcomes.elements())
    assert min(kinds["CorruptCheckpointError"], kinds["accepted"]) > 40 and kinds["UnsafePickleError"]


@pytest.mark.long
def test_hostile_checkpoints_in_processes_with_little_memory() -> None:
    command = [sys.executable, "-m", "tests.safety.fuzz", "--count", "10000", "--seed", "20260"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.parametrize("number", range(len(HOSTILE_PICKLES)))
def test_each_hostile_pickle_is_refused(tmp_path: Path, number: int) -> None:
    """As an object of a checkpoint, and as the ``.metadata`` of a stock one."""
    mark = tmp_path / "mark"
    data = HOSTILE_PICKLES[number](mark)
    refused = (CorruptCheckpointError, UnloadableError, UnsafePickleError)
    with pytest.raises(refused):
        parse_stock_metadata(data, str(tmp_path / ".metadata"))
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as records:
        for name, content in (("data.pkl", data), ("version", b"3"), ("byteorder", b"little")):
            records.writestr(f"archive/{name}", content)
    with quiet(), pytest.raises(refused):
        unpickle(archive.getvalue(), "o", "somewhere", allow_pickle=False)
    assert not mark.exists() and not hasattr(MetadataIndex, "poisoned") and not hasattr(OrderedDict, "poisoned")


def test_pickles_of_real_objects_pass(tmp_path: Path) -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        check_pickle(pickle.dumps({"a": [1, (2, "x")], (1, 2): {3.5}, "deep": [[[[]]]]}, protocol=protocol))
    for value in everything().values():
        stored = io.BytesIO()
        torch.save(value, stored)
        check_archive(stored, stored.tell(), "o", "somewhere")
    many = {(i, i + 1): list(range(10)) for i in range(10_000)}
    check_pickle(pickle.dumps(many))
    shared = tuple(range(1000))
    check_pickle(pickle.dumps([shared] * 10_000))


def test_size_of_what_would_be_hashed_is_counted_and_not_what_is_there() -> None:
    nest: object = 1
    for _ in range(60):
        nest = (nest, nest)
    check_pickle(pickle.dumps(nest))  # nobody hashes it
    with pytest.raises(ValueError, match="very long to hash"):
        check_pickle(_as_key(pickle.dumps(nest)))
    tuples = b"".join(b"h%ch%c\x86q%c0" % (n, n, n + 1) for n in range(2, 60))
    filled_later = b"\x80\x02]q\x00\x85q\x010K\x01q\x020" + tuples + b"h\x00h%ca0c__builtin__\nset\nh\x01R." % 60
    with pytest.raises(ValueError, match="very long to hash"):
        check_pickle(filled_later)
    with pytest.raises(ValueError, match="nested deeper"):
        check_pickle(b"\x80\x02N" + b"\x85" * 5000 + b".")
    with pytest.raises(ValueError, match="memo"):
        check_pickle(b"\x80\x02Nr" + struct.pack("<I", 1 << 30) + b".")
    with pytest.raises(ValueError, match="changes a class"):
        check_pickle(b"\x80\x02ccollections\nOrderedDict\nN}X\x01\x00\x00\x00xK\x01s\x86b.")


def _as_key(data: bytes) -> bytes:
    assert data[-1:] == b"."
    start = 11 if data[2:3] == b"\x95" else 2  # behind the protocol and the frame
    return data[:2] + b"}" + data[start:-1] + b"K\x01s."
