"""Exit codes, errors, options that commands share; once more as real processes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import stager
import stager.demo
import stager.doctor
from stager.demo import DemoConfig, RanksConfig
from stager.doctor import Finding, Status
from stager.workers.errors import (
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    StorageError,
    UsageError,
    WorkerDiedError,
)
from tests.cli.conftest import Outcome

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))

ERRORS = [
    (ConfigError("arena.bufers: unknown key"), 2, "arena.bufers: unknown key"),
    (UsageError("not like this"), 2, "not like this"),
    (CheckpointNotFoundError(None, "none here", "/run"), 1, "/run: none here"),
    (StorageError(28, "cannot write", "/run"), 1, "/run: cannot write [No space left on device]"),
    (CorruptCheckpointError("/run/step", "bad hash"), 1, "/run/step: bad hash"),
    (WorkerDiedError(7, -9, "write"), 1, "worker 7 was killed by SIGKILL while running write"),
]


def failing_with(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(stager.doctor, "run_checks", fail)


@pytest.mark.parametrize(("error", "code", "message"), ERRORS, ids=[type(e).__name__ for e, _, _ in ERRORS])
def test_error_becomes_a_message_and_an_exit_code(
    error: Exception, code: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_with(monkeypatch, error)
    outcome = Outcome("doctor")
    assert (outcome.code, outcome.out, outcome.err) == (code, "", f"stager: {message}\n")


def test_error_that_is_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    failing_with(monkeypatch, ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError):
        Outcome("doctor")


@pytest.mark.parametrize(
    ("statuses", "code"), [([Status.OK], 0), ([Status.OK, Status.WARN], 0), ([Status.FAIL, Status.OK], 1)]
)
def test_doctor_says_no_when_a_check_fails(statuses: list[Status], code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    findings = [Finding(f"check {i}", "7 [b]", s, "it means much", "do this") for i, s in enumerate(statuses)]
    monkeypatch.setattr(stager.doctor, "run_checks", lambda *_: findings)
    outcome = Outcome("doctor")
    assert outcome.code == code
    assert [line.split()[0] for line in outcome.out.splitlines() if " check " in line][1:] == [
        s.value for s in statuses
    ]
    assert "7 [b]" in outcome.out
    assert "-> do this" in outcome.out
    answer = Outcome("doctor", "--json")
    assert (answer.code, [finding["status"] for finding in answer.json]) == (code, [s.value for s in statuses])


def test_doctor_checks_the_directory_with_the_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Any] = []

    def no_findings(*arguments: Any) -> list[Finding]:
        asked.append(arguments)
        return []

    monkeypatch.setattr(stager.doctor, "run_checks", no_findings)
    (tmp_path / "c.yaml").write_text("arena: {buffers: 4}\nworkers: {nice: 1}")
    assert Outcome("doctor", tmp_path, "--config", tmp_path / "c.yaml", "--set", "workers.nice=3").code == 0
    ((directory, config),) = asked
    assert (directory, config.arena.buffers, config.workers.nice) == (str(tmp_path), 4, 3)


def test_doctor_on_this_host(tmp_path: Path) -> None:
    outcome = Outcome("doctor", tmp_path, "--json")
    names = {finding["name"] for finding in outcome.json}
    assert {
        "Python",
        "torch",
        "CUDA",
        "cores",
        "memory",
        "/dev/shm",
        "open files",
        "file system",
        "free space",
    } <= names
    assert [f for f in outcome.json if f["status"] == "fail"] == []
    assert outcome.code == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [0, 1])
def test_demo_passes_its_options_on_and_its_exit_code_back(
    code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[Any] = []

    def demo_that_ends(*arguments: Any) -> int:
        asked.append(arguments)
        return code

    monkeypatch.setattr(stager.demo, "run_demo", demo_that_ends)
    assert Outcome("demo", "--out", tmp_path / "here", "--set", "demo.seed=77", "--json").code == code
    ((config, out, _, as_json, store),) = asked
    assert isinstance(config, DemoConfig)
    assert (config.demo.seed, out, as_json, store) == (77, tmp_path / "here", True, "")


def test_demo_in_an_object_store_writes_its_report_here(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(stager.demo, "run_demo", lambda *arguments: asked.append(arguments) or 0)
    assert Outcome("demo", "--out", "s3://bucket/demo/").code == 0
    ((_, out, _, _, store),) = asked
    assert (out, store) == (Path("runs/demo"), "s3://bucket/demo")


@pytest.mark.parametrize(
    ("file", "world_size", "defaults", "out"),
    [
        (None, None, DemoConfig(), "runs/demo"),
        (None, "1", DemoConfig(), "runs/demo"),
        (None, "2", RanksConfig(), "runs/demo-ranks"),
        ("torchrun.yaml", "2", RanksConfig(), "runs/demo-ranks"),
        ("default.yaml", "2", RanksConfig(), "runs/demo-ranks"),
        ("demo.yaml", "1", DemoConfig(), "runs/demo"),
    ],
)
def test_number_of_ranks_decides_the_demos_defaults_and_directory(
    file: str | None, world_size: str | None, defaults: DemoConfig, out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(stager.demo, "run_demo", lambda *arguments: asked.append(arguments) or 0)
    if world_size is not None:
        monkeypatch.setenv("WORLD_SIZE", world_size)
        monkeypatch.setenv("RANK", "0")
    arguments = ["--config", CONFIGS[0].parent / file] if file else []
    assert Outcome("demo", *arguments).code == 0
    ((config, directory, *_),) = asked
    assert (config.demo.model_dump(), directory) == (defaults.demo.model_dump(), Path(out))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_doctor_accepts_every_file_in_configs(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stager.doctor, "run_checks", lambda *_: [])
    assert Outcome("doctor", "--config", file).code == 0


MISTAKES = {
    "misspelt key": ("arena:\n  bufers: 3\n", ":2: arena.bufers: unknown key; did you mean arena.buffers?"),
    "wrong type": ("arena:\n  buffers: many\n", ":2: arena.buffers: got 'many' (text); allowed: an integer"),
    "negative size": ("arena:\n  max_host_bytes: -8GiB\n", ":2: arena.max_host_bytes: '-8GiB' is negative; allowed: "),
    "not YAML": ("arena: [\n", ":2: not valid YAML: "),
}


@pytest.mark.parametrize("command", ["doctor", "demo"])
@pytest.mark.parametrize(("text", "words"), MISTAKES.values(), ids=MISTAKES)
def test_mistake_in_a_config_file_is_wrong_usage(command: str, text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    outcome = Outcome(command, "--config", file)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith(f"stager: {file}{words}")


@pytest.mark.parametrize("command", ["doctor", "demo"])
def test_mistake_in_set_or_environment_is_wrong_usage(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Outcome(command, "--set", "arena.bufers=3").err.startswith("stager: --set arena.bufers=3: arena.bufers: ")
    monkeypatch.setenv("STAGER_ARENA__BUFFERS", "none")
    outcome = Outcome(command)
    assert outcome.code == 2
    assert outcome.err.startswith("stager: environment variable STAGER_ARENA__BUFFERS: arena.buffers: got 'none'")


@pytest.mark.parametrize("command", ["ls", "inspect", "verify", "prune --keep-latest 1", "recover", "plan"])
def test_directory_above_runs_is_answered_with_the_runs(command: str, run: Path) -> None:
    name, *options = command.split()
    outcome = Outcome(name, run.parent, *options)
    assert f"; it contains the run run: give the directory of one run, such as {run}\n" in outcome.out + outcome.err


def test_choice_that_does_not_exist_is_answered_with_those_that_do(tmp_path: Path) -> None:
    outcome = Outcome("export", tmp_path, "a.h5", "--format", "hdf5")
    assert outcome.code == 2 and "'--format': 'hdf5' is not one of" in outcome.err


def test_unknown_command_and_unknown_option_are_wrong_usage() -> None:
    assert Outcome("lss").code == 2
    assert Outcome("ls").code == 2
    assert Outcome("ls", ".", "--frob").code == 2


def test_version() -> None:
    outcome = Outcome("--version")
    assert (outcome.code, outcome.out) == (0, f"stager {stager.__version__}\n")


def python(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    environ = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).parents[2]), "NO_COLOR": "1"}
    return subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True, timeout=120, check=False)


def test_process_help_imports_neither_torch_nor_pydantic(tmp_path: Path) -> None:
    code = (
        "import sys, stager.cli\n"
        "try: stager.cli.app(['--help'])\n"
        "except SystemExit as error: assert not error.code\n"
        "print([m for m in ('torch', 'numpy', 'pydantic', 'workers') if m in sys.modules])\n"
    )
    done = python("-c", code, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(command in done.stdout for command in ("demo", "ls", "inspect", "verify", "doctor"))
    assert done.stdout.endswith("[]\n")


def test_installed_packages_import_nothing_of_the_tests() -> None:
    """The wheel has no tests: whatever imports them works from the source tree alone."""
    root = Path(__file__).parents[2]
    files = [file for package in ("stager", "workers") for file in (root / package).rglob("*.py")]
    assert len(files) > 100
    pattern = re.compile(r"^\s*(from|import) tests\b|[\"']tests\.\w", re.MULTILINE)
    assert [str(file.relative_to(root)) for file in files if pattern.search(file.read_text())] == []


def test_process_exit_codes(saved_run: Path, tmp_path: Path) -> None:
    whole = python("-m", "stager", "verify", saved_run, cwd=tmp_path)
    assert (whole.returncode, whole.stderr) == (0, "")
    absent = python("-m", "stager", "verify", tmp_path, cwd=tmp_path)
    assert (absent.returncode, absent.stdout) == (1, "")
    assert absent.stderr == f"stager: {tmp_path}: the directory has no committed checkpoint\n"


def test_process_with_a_misspelt_key_exits_with_a_message_and_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("arena:\n  bufers: 3\n")
    done = python("-m", "stager", "doctor", "--config", "c.yaml", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("stager: c.yaml:2: arena.bufers: unknown key; did you mean arena.buffers?")
    assert "Traceback" not in done.stderr
