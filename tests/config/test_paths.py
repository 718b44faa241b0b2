"""Paths as people write them: expanded, or refused with what is wrong, before anything is made."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stager import ArgumentError, Checkpointer, ConfigError, load_config, prune, recover, verify
from stager.workers.checkpoint.storage.paths import local_path
from tests.cli.conftest import Outcome
from tests.persistence.tasks import save

GOOD: dict[str, tuple[Any, str]] = {
    "plain": ("/data/runs", "/data/runs"),
    "path": (Path("/data/../data/runs"), "/data/runs"),
    "bytes": (b"/data/runs", "/data/runs"),
    "home": ("~/runs", "/home/me/runs"),
    "path of home": (Path("~") / "runs", "/home/me/runs"),
    "variable": ("$SCRATCH/runs", "/scratch/me/runs"),
    "braces": ("/data/${USER}-${RUN_ID}/x", "/data/me-7/x"),
    "URL": ("file:///data/my%20runs", "/data/my runs"),
    "URL with host": ("file://localhost/data", "/data"),
    "colon": ("/data/a:b/c", "/data/a:b/c"),
    "tilde inside": ("/data/a~b", "/data/a~b"),
    "a dollar": ("/data/costs$", "/data/costs$"),
}


@pytest.fixture
def environ(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.setenv("HOME", "/home/me")
    return {"SCRATCH": "/scratch/me", "USER": "me", "RUN_ID": "7", "EMPTY": ""}


@pytest.mark.parametrize(("path", "meant"), GOOD.values(), ids=GOOD)
def test_what_a_path_means(path: Any, meant: str, environ: dict[str, str]) -> None:
    assert local_path(path, environ=environ) == meant


BAD: dict[str, tuple[Any, str]] = {
    "s3": ("s3://bucket/runs", r"directory is 's3://bucket/runs', and this takes a path of a file system"),
    "s3 in a Path": (
        Path("s3://bucket/runs"),
        r"a slash is missing \(pathlib takes one away\); give text, 's3://bucket/runs'",
    ),
    "s3a": ("s3a://bucket/runs", r"does not support s3a://; write 's3://bucket/runs'"),
    "hdfs": ("HDFS://name/x", r"does not support hdfs://"),
    "unknown scheme": ("foo+bar://x", r"does not support foo\+bar://"),
    "file of a host": ("file://server/x", "names no file of this host"),
    "file in a Path": (Path("file:///x"), "names no file of this host; write file:///path"),
    "variable": ("$NOWHERE/runs", "environment variable NOWHERE is not set; set it"),
    "braces": ("/a/${NO_WHERE}/b", "environment variable NO_WHERE is not set"),
    "empty variable": ("$EMPTY/runs", "environment variable EMPTY is empty"),
    "user": ("~nobody-of-this-name/runs", "there is no user of that name"),
    "empty": ("", r"empty path; write '\.' for the current directory"),
    "blank": ("  ", "empty path"),
    "null": ("a\0b", "null character"),
    "https": ("https://example.com/model.pt", r"does not support https://.* To read what is there, download it"),
    "None": (None, r"directory must be text or a pathlib\.Path, got None \(NoneType\)$"),
    "number": (3, r"got 3 \(int\); a step is given to save\(\) or load\(\), as in .*\.load\(3\)"),
    "mapping": ({"a": 1}, r"must be text or a pathlib\.Path, got .* \(dict\)$"),
}


@pytest.mark.parametrize(("path", "words"), BAD.values(), ids=BAD)
def test_what_is_no_path(path: Any, words: str, environ: dict[str, str]) -> None:
    with pytest.raises(ArgumentError, match=words):
        local_path(path, environ=environ)


def test_name_with_a_dollar_that_is_there_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "$NOWHERE").mkdir()
    assert local_path(tmp_path / "$NOWHERE") == str(tmp_path / "$NOWHERE")


def test_current_directory_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(ArgumentError, match="current directory of this process was removed; give an absolute path"):
        local_path("runs")
    assert local_path("/runs") == "/runs"


CALLS: dict[str, Callable[[Any], Any]] = {
    "Checkpointer": Checkpointer,
    "read_only": lambda path: Checkpointer(path, read_only=True),
    "verify": verify,
    "recover": recover,
    "prune": lambda path: prune(path, keep_latest=1),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("path", ["hdfs://name/runs", Path("s3://bucket/runs"), "$NOWHERE_AT_ALL/runs", ""])
def test_every_call_refuses_what_is_no_path(
    call: Callable[[Any], Any], path: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArgumentError):
        call(path)
    assert os.listdir(tmp_path) == []  # no directory s3:


def test_every_call_expands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MY_RUNS", str(tmp_path))
    save(tmp_path / "run", step=1, fsync=False)
    for run in ("~/run", "$MY_RUNS/run"):
        assert verify(f"{run}/step-00000001").ok and recover(run).ok
        assert [verdict.step for verdict in prune(run, keep_latest=1).verdicts] == [1]
        assert Checkpointer(run, read_only=True).latest_step() == 1
        assert Outcome("ls", run, "--json").json["directory"] == str(tmp_path / "run")
        assert Outcome("verify", run).code == 0
    with Checkpointer("~/new", {"workers": {"count": 1}}):
        assert (tmp_path / "new" / ".stager.lock").exists()


def test_command_line_refuses_a_url() -> None:
    outcome = Outcome("ls", "hdfs://name/runs")
    assert outcome.code == 2 and "does not support hdfs://" in outcome.err


def test_paths_in_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MY_RUNS", "/runs")
    telemetry = load_config({"telemetry": {"events": "~/events.jsonl", "trace": "$MY_RUNS/trace.json"}}).telemetry
    assert (telemetry.events, telemetry.trace) == (f"{tmp_path}/events.jsonl", "/runs/trace.json")
    assert load_config({"telemetry": {"events": "events.jsonl"}}).telemetry.events == "events.jsonl"
    with pytest.raises(ConfigError, match=r"telemetry\.events.*NOWHERE_AT_ALL is not set"):
        load_config({"telemetry": {"events": "$NOWHERE_AT_ALL/events.jsonl"}})
    with pytest.raises(ConfigError, match=r"telemetry\.trace.*takes a path of a file system"):
        load_config({"telemetry": {"trace": "s3://bucket/trace.json"}})
