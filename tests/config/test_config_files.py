"""Every file in configs/: it loads, and each mistake made in it is reported with file, line and key path."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from stager.config import StagerConfig, load_config
from stager.config.layers import file_layer
from stager.workers.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(CONFIGS.glob("*.yaml"))


class Setting(NamedTuple):
    """One key of one file."""

    file: Path
    section: str
    key: str
    line: int
    value: Any

    @property
    def path(self) -> str:
        return f"{self.section}.{self.key}"

    @property
    def written(self) -> str:
        """The value as it stands in the file."""
        return self.file.read_text().splitlines()[self.line - 1].split("#")[0].split(":", 1)[1].strip()


def settings_of(file: Path) -> list[Setting]:
    layer = file_layer(str(file))
    return [
        Setting(file, section, key, layer.lines[(section, key)], value)
        for section, body in layer.values.items()
        for key, value in (body or {}).items()
    ]


def model_of(file: Path) -> type[StagerConfig]:
    from stager.demo.config import DemoConfig
    from stager.demo.ranks.config import RanksConfig
    from stager.stress.config import StressConfig

    models: dict[str, type[StagerConfig]] = {"demo": DemoConfig, "demo_ranks": RanksConfig, "stress": StressConfig}
    return next((models[section] for section in file_layer(str(file)).values if section in models), StagerConfig)


def name_of(file: Path) -> str:
    return file.name


def mutated(setting: Setting, directory: Path, old: str, new: str) -> Path:
    """A copy of the file in which the setting's line has ``new`` in place of ``old``."""
    lines = setting.file.read_text().splitlines()
    before = lines[setting.line - 1]
    after = before.split("#")[0].rstrip().replace(old, new, 1)
    assert after != before.split("#")[0].rstrip()
    lines[setting.line - 1] = after
    copy = directory / setting.file.name
    copy.write_text("\n".join(lines))
    return copy


def error_of(file: Path, model: type[StagerConfig]) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(file, environ={}, model=model)
    return str(caught.value)


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_file_loads(file: Path) -> None:
    config = load_config(file, environ={}, model=model_of(file))
    assert isinstance(config, model_of(file))


def test_default_file_equals_the_models_defaults_and_misses_no_key() -> None:
    config = load_config(CONFIGS / "default.yaml", environ={})
    assert config == StagerConfig()
    for section in StagerConfig.model_fields:
        written, known = getattr(config, section).model_fields_set, set(type(getattr(config, section)).model_fields)
        assert written == known, section


def test_each_key_of_the_default_file_has_a_comment() -> None:
    lines = (CONFIGS / "default.yaml").read_text().splitlines()
    assert [s.path for s in settings_of(CONFIGS / "default.yaml") if " # " not in lines[s.line - 1]] == []


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_each_key_misspelt_is_named_with_its_line_and_the_right_key(file: Path, tmp_path: Path) -> None:
    for setting in settings_of(file):
        copy = mutated(setting, tmp_path, f"{setting.key}:", f"{setting.key}x:")
        message = error_of(copy, model_of(file))
        assert message.startswith(f"{copy}:{setting.line}: {setting.path}x: unknown key; did you mean {setting.path}?")


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_each_value_of_a_wrong_type_is_named_with_what_is_allowed(file: Path, tmp_path: Path) -> None:
    for setting in settings_of(file):
        copy = mutated(setting, tmp_path, f": {setting.written}", ": {a: [1]}")
        message = error_of(copy, model_of(file))
        assert message.startswith(f"{copy}:{setting.line}: {setting.path}: got {{'a': [1]}} (a mapping)")
        assert "allowed: " in message


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_each_number_made_negative_is_named_with_what_is_allowed(file: Path, tmp_path: Path) -> None:
    numeric = [s for s in settings_of(file) if type(s.value) in (int, float) or s.key.endswith("_bytes")]
    assert numeric
    for setting in numeric:
        negative = f"-{setting.written if setting.value != 0 else 1}"
        copy = mutated(setting, tmp_path, f": {setting.written}", f": {negative}")
        message = error_of(copy, model_of(file))
        assert message.startswith(f"{copy}:{setting.line}: {setting.path}: ")
        assert f"{yaml.safe_load(negative)}" in message
        assert "allowed: " in message


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_misspelt_section_is_named(file: Path, tmp_path: Path) -> None:
    section = next(iter(file_layer(str(file)).values))
    copy = tmp_path / file.name
    copy.write_text(file.read_text().replace(f"\n{section}:", f"\n{section}x:", 1))
    message = error_of(copy, model_of(file))
    assert f"{section}x: unknown section; did you mean {section}?" in message
