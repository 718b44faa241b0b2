"""URLs as people write them, in every place that takes a path; and what a store says that does not want."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from typer.testing import CliRunner

from stager import (
    ArgumentError,
    Checkpointer,
    ConfigError,
    PathCheckpointer,
    StagerStorageReader,
    StorageError,
    UsageError,
    WorkerStager,
    load_checkpoint,
    recover,
    verify,
)
from stager.cli.app import app
from stager.workers.checkpoint.storage.objects.client import client_of
from stager.workers.checkpoint.storage.objects.refusal import refusal
from stager.workers.checkpoint.storage.paths import place_path
from tests.object_stores.servers import Server, Servers


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("s3:/bucket/run", r"a slash is missing.*'s3://bucket/run'"),
        ("s3:bucket/run", r"write 's3://bucket/run'"),
        ("s3//bucket/run", r"write 's3://bucket/run'"),
        ("s3a://bucket/run", r"write 's3://bucket/run'"),
        ("s3://", r"names no bucket; write 's3://bucket/run'"),
        ("s3:///run", r"no bucket has this name; write 's3://bucket/run'"),
        ("s3://user:word@bucket/run", r"no bucket has this name"),
        ("s3://bucket:80/run", r"no bucket has this name"),
        ("s3://bucket?x=1", r"no bucket has this name"),
        ("s3://bucket/a\nb", r"no control character"),
        ("s3://bucket/a/../b", r"no part of a key"),
    ],
)
def test_a_url_that_cannot_be_meant(url: str, says: str) -> None:
    with pytest.raises(ArgumentError, match=says):
        place_path(url)


@pytest.mark.parametrize("url", ["S3://bucket/run/", "s3://bucket//run", b"s3://bucket/run"])
def test_a_url_that_is_meant(url: Any) -> None:
    assert place_path(url) == "s3://bucket/run"


def test_a_directory_that_looks_like_a_typing_error_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s3:bucket").mkdir()
    assert place_path("s3:bucket") == str(tmp_path / "s3:bucket")
    assert place_path("./s3:other") == str(tmp_path / "s3:other")


def test_a_bucket_is_no_checkpoint(run_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with PathCheckpointer() as ckpt:
        for act in (lambda: ckpt.save("s3://bucket", {"x": torch.ones(1)}), lambda: ckpt.load("s3://bucket")):
            with pytest.raises(ArgumentError, match="a bucket; name a checkpoint in it"):
                act()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("command", [["stress", "--out"], ["export", "{run}", "--out"]])
def test_what_writes_files_here_refuses_a_url(run_url: str, tmp_path: Path, command: list[str]) -> None:
    with Checkpointer(tmp_path / "run") as ckpt:
        ckpt.save(1, {"x": torch.ones(1)})
    words = [word.format(run=tmp_path / "run") for word in command]
    result = CliRunner().invoke(app, [*words, run_url])
    assert result.exit_code != 0


def test_a_worker_stager_writes_no_file_to_a_url(run_url: str) -> None:
    with WorkerStager() as stager, pytest.raises(ArgumentError, match=r"persist_to is .*path of a file system"):
        stager.stage({"x": torch.ones(1)}, persist_to=f"{run_url}/x.pt")


def test_a_run_inside_a_run_is_not_taken_for_data_of_a_save(run_url: str) -> None:
    inner = f"{run_url}/gpt.data-9f86d081884c7d65"
    with pytest.raises(StorageError, match="no run can have this name"):
        Checkpointer(inner)
    with PathCheckpointer() as ckpt, pytest.raises(ArgumentError, match="data of a save"):
        ckpt.save(inner, {"x": torch.ones(1)})
    with pytest.raises(ConfigError, match="data of a save"):
        Checkpointer(run_url, config={"persistence": {"name": "gpt.data-0123456789abcdef{step}"}})
    with PathCheckpointer() as ckpt:
        ckpt.save(f"{run_url}/gpt.data-c4", {"x": torch.ones(1)})
    recover(run_url)
    assert verify(f"{run_url}/gpt.data-c4").ok


def test_a_forked_child_is_told_and_its_parent_goes_on(run_url: str) -> None:
    with Checkpointer(run_url) as ckpt:
        ckpt.save(1, {"x": torch.ones(3)}).upload_completion.result()
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            said = "loaded"
            try:
                load_checkpoint(f"{run_url}/step-00000001")
            except UsageError as error:
                said = str(error)
            finally:
                os.write(write, said.encode())
                os._exit(0)
        os.close(write)
        with open(read) as pipe:
            assert "works in no forked child" in pipe.read()
        assert os.waitpid(child, 0)[1] == 0
        ckpt.save(2, {"x": torch.ones(3)}).upload_completion.result(60)
    assert verify(f"{run_url}/step-00000002").ok


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_a_run_is_no_checkpoint_for_torch(run_url: str) -> None:
    with Checkpointer(run_url) as ckpt:
        ckpt.save(1, {"x": torch.ones(3)})
    for url in (run_url, f"{run_url}/step-00000002"):
        with pytest.raises(CheckpointException) as raised:
            dcp.load({"x": torch.zeros(3)}, storage_reader=StagerStorageReader(url))
        assert "__0.metadata" not in str(raised.value) and run_url in str(raised.value)


# -- what a store says ----------------------------------------------------------------------------------------------


def test_a_bucket_that_does_not_exist(run_url: str) -> None:
    with pytest.raises(StorageError, match=r"NoSuchBucket.*create the bucket, or correct its name") as raised:
        Checkpointer("s3://buckte/run")
    assert "<?xml" not in str(raised.value) and raised.value.errno == 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "403 Forbidden: <Code>InvalidAccessKeyId</Code><Message>no such key</Message>",
            "InvalidAccessKeyId: no such key.*AWS_",
        ),
        (
            "Error performing PUT http://169.254.169.254/latest/api/token",
            "no credentials were found.*AWS_ACCESS_KEY_ID",
        ),
        ("error sending request\n\nDebug source:\nGeneric {", "error sending request; check that http://here is"),
        ("401 Unauthorized", "check the credentials"),
    ],
)
def test_what_a_request_has_failed_of(text: str, says: str) -> None:
    error = refusal("read", "s3://bucket/x", "http://here", RuntimeError(text), is_denied=False)
    with pytest.raises(StorageError, match=says):
        raise error
    assert "Debug" not in str(error)


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT"])
def test_an_endpoint_without_a_scheme_is_named(run_url: str, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.setenv(name, "127.0.0.1:9")
    client_of.cache_clear()
    with pytest.raises(ConfigError, match=r"'127\.0\.0\.1:9'.*lacks http:// or https://"):
        Checkpointer(run_url)


def test_doctor_asks_the_store(
    servers: Servers, run_url_of: Callable[[Server], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_url = run_url_of(servers.of("ministack"))
    result = CliRunner().invoke(app, ["doctor", run_url, "--json"])
    assert result.exit_code == 0, result.output
    assert '"conditional writes"' in result.output and "rename is atomic" not in result.output
    result = CliRunner().invoke(app, ["doctor", "s3://buckte/run", "--json"])
    assert result.exit_code == 1 and "NoSuchBucket" in result.output


def test_init_says_nothing_of_a_disk(run_url: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["init", str(tmp_path / "a.yaml"), "--dir", run_url])
    assert result.exit_code == 0, result.output
    text = (tmp_path / "a.yaml").read_text()
    assert "in an object store" in text and " is on " not in text
