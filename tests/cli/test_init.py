"""``stager init``: the file that it writes is a valid configuration, with a comment for every key."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from stager.cli.state_options import OptimizerName
from stager.config import StagerConfig, load_config
from stager.planning import Host, JobShape, Place, from_numbers, propose, settings_file, work_out
from stager.planning.optimizers import OptimizerKind
from tests.cli.conftest import Outcome

GIB = 1 << 30
HOST = Host(available_bytes=64 * GIB, num_cores=16, max_open_files=1024)
DISK = Place("runs/a", "ext4", 1000 * GIB)


def chosen(num_params: int = 0, host: Host = HOST, place: Place = DISK) -> StagerConfig:
    """What the file for these facts says."""
    state = from_numbers(num_params, "float32", OptimizerKind.NONE, 10).state if num_params else None
    need = work_out(state, StagerConfig(), JobShape(), host) if state is not None else None
    text = settings_file(["Head."], propose(host, JobShape(), place, need))
    return load_config(yaml.safe_load(text), environ={})


def test_file_for_this_host_is_a_valid_configuration(tmp_path: Path) -> None:
    outcome = Outcome("init", tmp_path / "stager.yaml", "--dir", tmp_path / "run")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith(f"wrote {tmp_path}/stager.yaml; use it with Checkpointer(")
    config = load_config(tmp_path / "stager.yaml", environ={})
    assert config == StagerConfig()  # nothing is known of the state, and each auto is as good here as anywhere
    assert not (tmp_path / "run").exists()


def test_each_key_is_in_the_file_with_its_default_or_a_choice_and_its_description(tmp_path: Path) -> None:
    assert Outcome("init", tmp_path / "stager.yaml").code == 0
    text = (tmp_path / "stager.yaml").read_text()
    everything = re.sub(r"^  # (\w+: \S.*?)  # .*$", r"  \1", text, flags=re.MULTILINE)
    written = yaml.safe_load(everything)
    assert {name: set(body) for name, body in written.items()} == {
        name: set(type(getattr(StagerConfig(), name)).model_fields) for name in StagerConfig.model_fields
    }
    assert load_config(written, environ={}) == StagerConfig()
    joined = re.sub(r"\s*\n\s*# ", " ", text)
    for name in StagerConfig.model_fields:
        for key, field in type(getattr(StagerConfig(), name)).model_fields.items():
            assert field.description and field.description in joined, key


def test_each_choice_says_why(tmp_path: Path) -> None:
    for choice in propose(HOST, JobShape(num_ranks=16, local_world_size=8), DISK, None):
        assert choice.reason, choice


def test_state_decides_how_much_memory_its_snapshots_may_take() -> None:
    config = chosen(10**9)
    assert 2 * 4e9 * 1.25 <= config.arena.resolve_max_host_bytes(0) <= 2 * 4e9 * 1.26
    assert chosen(20 * 10**9).arena.max_host_bytes == "75%"  # it does not fit: no number is better
    assert config.retention.keep_latest is None


def test_disk_that_is_soon_full_gets_a_rule_of_retention() -> None:
    assert chosen(10**9, place=Place("runs/a", "ext4", 48 * 10**9)).retention.keep_latest == 5
    assert chosen(10**9, place=Place("runs/a", "ext4", 10**9)).retention.keep_latest == 2


def test_only_core_goes_to_the_trainer_first() -> None:
    assert chosen(host=Host(GIB, 1, None)).workers.nice == 19


def test_file_that_exists_is_replaced_only_with_force(tmp_path: Path) -> None:
    file = tmp_path / "stager.yaml"
    file.write_text("mine: true\n")
    outcome = Outcome("init", file)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == f"stager: {file}: exists already; name another file, or replace it with --force\n"
    assert file.read_text() == "mine: true\n"
    assert Outcome("init", file, "--force").code == 0
    assert load_config(file, environ={}) == StagerConfig()


def test_state_of_a_callable_is_measured_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_module_of_the_user.py").write_text(
        "import torch\ndef make():\n    return torch.nn.Linear(1000, 1000)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    outcome = Outcome("init", "--state", "a_module_of_the_user:make", "--optimizer", OptimizerName.ADAMW.value)
    assert outcome.code == 0
    text = (tmp_path / "stager.yaml").read_text()
    assert "a_module_of_the_user:make (8 tensors, 11.5 MiB)" in text.replace("\n# ", " ")
    assert load_config(tmp_path / "stager.yaml", environ={}).arena.max_host_bytes == 29 << 20


def test_state_that_does_not_fit_is_said(tmp_path: Path) -> None:
    outcome = Outcome("init", tmp_path / "a.yaml", "--params", "1B", "--memory", "2GiB")
    assert outcome.code == 0
    assert "-> a snapshot needs " in outcome.out
    assert "# Note: a snapshot needs " in (tmp_path / "a.yaml").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--state", "a:b", "--params", "1M"), "give --state or --params, not both"),
        (("--meta",), "--meta needs --state"),
        (("--optimizer", "adamw"), "--optimizer needs --state or --params"),
        (("--state", "nothing"), "--state nothing: it must have the form package.module:callable"),
        (("--params", "many"), "--params many is not a number of parameters; write it as 124000000, 124M or 70B"),
        (("--memory", "much"), "--memory much: 'much' is not a size"),
    ],
)
def test_wrong_options_write_nothing(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    outcome = Outcome("init", tmp_path / "a.yaml", *arguments)
    assert (outcome.code, outcome.err) == (2, f"stager: {message}\n")
    assert not (tmp_path / "a.yaml").exists()


def test_directory_that_does_not_exist_is_an_error_of_storage(tmp_path: Path) -> None:
    outcome = Outcome("init", tmp_path / "none" / "a.yaml")
    assert outcome.code == 1
    assert outcome.err.startswith(f"stager: {tmp_path}/none/a.yaml: cannot write the file [No such file or directory]")
