"""Where settings come from, which wins, what is refused and how that is worded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError, model_validator
from typing_extensions import Self

from stager.config import ArenaConfig, Section, StagerConfig, WorkersConfig, load_config
from stager.workers.errors import ConfigError, UsageError


class ShopSettings(Section):
    apples: int = 1
    pears: int = 1

    @model_validator(mode="after")
    def _more_apples(self) -> Self:
        if self.pears > self.apples:
            raise ValueError("pears must not outnumber apples")
        return self


class ShopConfig(StagerConfig):
    shop: ShopSettings = ShopSettings()
    motto: str = "none"


def error_of(config: Any = None, overrides: tuple[str, ...] = (), **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(config, overrides, **{"environ": {}, **options})
    return str(caught.value)


def test_without_anything_are_the_models_defaults() -> None:
    assert load_config(environ={}) == StagerConfig()


def test_environment_is_the_process_s_own_when_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAGER_ARENA__BUFFERS", "7")
    assert load_config().arena.buffers == 7


def test_set_wins_over_environment_and_that_over_file_and_that_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("workers: {nice: 1, max_restarts: 1, count: 1}")
    environ = {"STAGER_WORKERS__NICE": "2", "STAGER_WORKERS__MAX_RESTARTS": "2"}
    workers = load_config(file, ["workers.nice=5", "workers.nice=3"], environ).workers
    assert (workers.nice, workers.max_restarts, workers.count, workers.ionice) == (3, 2, 1, "low")


@pytest.mark.parametrize("as_given", [str, Path, lambda p: p.parent / p.name], ids=["str", "Path", "joined"])
def test_path_may_be_text_or_path(as_given: Any, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("arena: {buffers: 4}")
    assert load_config(as_given(tmp_path / "c.yaml"), environ={}).arena.buffers == 4


def test_mapping_may_hold_models() -> None:
    config = load_config({"arena": ArenaConfig(buffers=5), "workers": {"count": 3}}, environ={})
    assert (config.arena.buffers, config.workers.count) == (5, 3)


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "arena:\n", "{}"])
def test_empty_file_or_section_means_defaults(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    assert load_config(tmp_path / "c.yaml", environ={}) == StagerConfig()


def test_a_model_is_taken_as_it_is_and_the_environment_does_not_change_it() -> None:
    config = load_config(None, ["arena.buffers=5"], environ={})
    assert load_config(config, environ={"STAGER_ARENA__BUFFERS": "3"}) is config


def test_overrides_leave_what_a_model_has_not_set_unset() -> None:
    config = load_config({"arena": {"buffers": 3}}, environ={})
    changed = load_config(config, ["workers.count=3"])
    assert changed.model_fields_set == {"arena", "workers"}
    assert (changed.arena.model_fields_set, changed.workers.model_fields_set) == ({"buffers"}, {"count"})
    assert (changed.arena.buffers, changed.workers.count) == (3, 3)


def test_overrides_apply_to_a_model_and_keep_its_class() -> None:
    config = load_config(ShopConfig(shop=ShopSettings(apples=4)), ["shop.pears=3"], environ={})
    assert isinstance(config, ShopConfig)
    assert (config.shop.apples, config.shop.pears) == (4, 3)


def test_a_plain_model_becomes_the_asked_for_subclass() -> None:
    config = load_config(StagerConfig(arena=ArenaConfig(buffers=4)), environ={}, model=ShopConfig)
    assert isinstance(config, ShopConfig)
    assert config.arena.buffers == 4


def test_subclass_adds_sections_and_plain_values() -> None:
    config = load_config({"shop": {"apples": 3}, "motto": "all fresh"}, ["shop.pears=2"], {}, model=ShopConfig)
    assert (config.shop.apples, config.shop.pears, config.motto) == (3, 2, "all fresh")


def test_section_of_a_command_is_passed_over_in_files_and_environment_but_not_in_set(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("demo: {steps: 3}\narena: {buffers: 3}")
    assert load_config(tmp_path / "c.yaml", environ={"STAGER_DEMO__STEPS": "1"}).arena.buffers == 3
    assert "demo: unknown section" in error_of(None, ("demo.steps=3",))


@pytest.mark.parametrize("name", ["STAGER_HOME", "STAGER", "ARENA__BUFFERS", "XSTAGER_ARENA__BUFFERS"])
def test_other_environment_variables_are_none_of_our_business(name: str) -> None:
    assert load_config(environ={name: "5"}) == StagerConfig()


def test_configuration_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load_config(environ={}).arena.buffers = 3


WRONG_VALUES = [
    ("arena.buffers=1", "got 1 (an integer); allowed: an integer of at least 2"),
    ("arena.buffers=true", "got true (a boolean); allowed: an integer of at least 2"),
    ("arena.buffers='3'", "got '3' (text); allowed: an integer of at least 2"),
    ("arena.buffers=2.0", "got 2.0 (a number); allowed: an integer of at least 2"),
    ("arena.buffers=", "got null (nothing); allowed: an integer of at least 2"),
    ("arena.prefault=1", "got 1 (an integer); allowed: true or false"),
    ("arena.prefault='yes'", "got 'yes' (text); allowed: true or false"),
    ("arena.pin=1", 'got 1 (an integer); allowed: "auto" or true or false'),
    ("arena.when_full=no", 'got false (a boolean); allowed: "wait", "skip" or "raise"'),
    ("arena.max_host_bytes=-8GiB", "'-8GiB' is negative; allowed: a size in bytes"),
    ("arena.max_host_bytes=0", "a limit of 0 bytes leaves no room"),
    ("arena.max_host_bytes=120%", "'120%' is not above 0% and at most 100%; allowed: a size in bytes"),
    ("arena.max_host_bytes=0%", "'0%' is not above 0% and at most 100%"),
    ("arena.max_host_bytes=half", "'half' is not a size"),
    ("persistence.segment_bytes=-64MiB", "'-64MiB' is negative; allowed: a size in bytes"),
    ("persistence.segment_bytes=1KiB", '"1.5GB", of at least 65536'),
    ("persistence.segment_bytes=1MIX", "'MIX' is not a unit"),
    ("persistence.segment_bytes=true", "got true (a boolean): not a size; allowed: a size in bytes"),
    ("persistence.format=zip", "got 'zip' (text); allowed: \"dcp\""),
    ("workers.count=0", 'got 0 (an integer); allowed: "auto" or an integer of at least 1'),
    ("workers.count=many", "got 'many' (text); allowed: \"auto\" or an integer of at least 1"),
    ("workers.nice=20", "got 20 (an integer); allowed: an integer from 0 to 19"),
    ("workers.start_timeout_secs=0", "got 0 (an integer); allowed: a number of seconds, above 0"),
    ("workers.start_timeout_secs=.inf", "got inf (a number); allowed: a number of seconds, above 0"),
    ("workers.start_timeout_secs=.nan", "got nan (a number)"),
    ("loading.safe_globals=a.B", "got 'a.B' (text); allowed: a list; write [\"a.B\"]"),
    ("retention.protect=3", "got 3 (an integer); allowed: a list; write [3]"),
    ("retention.protect=x", "got 'x' (text); allowed: a list"),
    ("telemetry.events=3", "got 3 (an integer); allowed: the path of a file or null"),
]


@pytest.mark.parametrize(("setting", "words"), WRONG_VALUES, ids=[s for s, _ in WRONG_VALUES])
def test_wrong_value_is_worded_alike_from_set_environment_and_mapping(setting: str, words: str) -> None:
    path, _, value = setting.partition("=")
    section, _, key = path.partition(".")
    from_set = error_of(None, (setting,))
    assert from_set.startswith(f"overrides[0] {setting!r}: {path}: ")
    assert words in from_set
    variable = f"STAGER_{section}__{key}".upper()
    assert error_of(environ={variable: value}) == from_set.replace(
        f"overrides[0] {setting!r}", f"environment variable {variable}"
    )


UNKNOWN_KEYS = [
    ("arena.bufers=3", "arena.bufers: unknown key; did you mean arena.buffers? (keys of arena: buffers, "),
    ("arena.nice=3", "arena.nice: unknown key; did you mean workers.nice?"),
    ("arena.zzz=3", "arena.zzz: unknown key (keys of arena: buffers, "),
    ("areena.buffers=3", "areena: unknown section; did you mean arena? (sections: workers, arena, "),
    ("buffers.x=3", "buffers: unknown section; did you mean arena.buffers?"),
    ("arena.buffers.x=3", "arena.buffers.x: unknown key; did you mean arena.buffers?"),
]


@pytest.mark.parametrize(("setting", "words"), UNKNOWN_KEYS, ids=[s for s, _ in UNKNOWN_KEYS])
def test_unknown_key_is_named_with_the_nearest(setting: str, words: str) -> None:
    assert error_of(None, (setting,)).startswith(f"overrides[0] {setting!r}: {words}")


@pytest.mark.parametrize("text", ["arena.buffers", "buffers=3", "=3", ".buffers=3", "arena.=3", ""])
def test_malformed_set_is_refused(text: str) -> None:
    assert error_of(None, (text,)).startswith(f"overrides[0] {text!r}: must have the form section.key=value")


def test_every_problem_is_listed_with_its_own_source(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("arena:\n  bufers: 3\n  prefault: 3\n")
    message = error_of(file, ("workers.nice=-1",), environ={"STAGER_LOADING__VERIFY": "never"})
    assert [line.split(": ")[:2] for line in sorted(message.splitlines())] == sorted(
        [
            ["overrides[0] 'workers.nice=-1'", "workers.nice"],
            [f"{file}:2", "arena.bufers"],
            [f"{file}:3", "arena.prefault"],
            ["environment variable STAGER_LOADING__VERIFY", "loading.verify"],
        ]
    )


def test_space_that_is_missing_behind_a_colon_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("workers:\n  count: 1\narena:\n  buffers:3\n")
    assert error_of(file) == f"{file}:4: arena: 'buffers:3' is text; put a space after the colon: buffers: 3"
    file.write_text("arena:\n  nothing\n")
    assert error_of(file) == f"{file}:2: arena: got 'nothing' (text); a section is a mapping of keys to values"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"arena": 5}, "config: arena: got 5 (an integer); a section is a mapping of keys to values"),
        ({"arena": {"bufers": 5}}, "config: arena.bufers: unknown key; did you mean arena.buffers?"),
        ({"arena": {1: 5}}, "config: arena.1: unknown key"),
        ({"pin": True}, 'config: pin: is a key of the section arena; write {"arena": {"pin": True}}'),
        ({"pin": object()}, 'config: pin: is a key of the section arena; write {"arena": {"pin": ...}}'),
        ({"keep_best": {}}, "config: keep_best: unknown section; did you mean retention.keep_best?"),
        ({1: {}}, "config: 1: unknown section"),
        (17, "config: expected a path, a mapping, a StagerConfig or None, got 17"),
    ],
    ids=[
        "section not a mapping",
        "misspelt",
        "integer key",
        "key alone",
        "object",
        "rule alone",
        "integer section",
        "another type",
    ],
)
def test_wrong_mapping_is_refused(config: Any, words: str) -> None:
    assert error_of(config).startswith(words)


def test_rule_between_keys_names_the_section_and_the_sources_of_its_keys() -> None:
    message = error_of({"shop": {"apples": 1}}, ("shop.pears=2",), model=ShopConfig)
    assert message == "config, overrides[0] 'shop.pears=2': shop: pears must not outnumber apples"


def test_config_error_is_the_users() -> None:
    assert issubclass(ConfigError, UsageError)


BAD_FILES = {
    "a list": ("- 1\n", ": must be a mapping of sections such as 'arena:', not a list"),
    "a number": ("3\n", ": must be a mapping of sections such as 'arena:', not a int"),
    "open bracket": ("arena:\n  buffers: [1\n", ":2: not valid YAML: the '[' that is opened here is not closed"),
    "open brace": ("arena: {buffers: 3\n\n\n", ":1: not valid YAML: the '{' that is opened here is not closed"),
    "open quote": ("arena:\n  when_full: 'wait\n\n", ":2: not valid YAML: the quote that is opened here is not closed"),
    "bracket without anything": (
        "arena: [\n",
        ":2: not valid YAML: a bracket is not closed before the end of the file",
    ),
    "open brace, and another section": ("arena: {pin: auto\nworkers: {}\n", ":2: not valid YAML: expected ',' or '}'"),
    "tab": ("arena:\n\tbuffers: 3\n", ":2: not valid YAML: found character '\\t' that cannot start any token (a tab; "),
    "key without its section": (
        "arena:\n  pin: auto\nbuffers: 3\n",
        ":3: buffers: is a key of the section arena; write `arena:` and below it, indented, `buffers: 3`",
    ),
    "key of several sections": (
        "verify: full\n",
        ":1: verify: is a key of the sections staging, retention, loading; write it in the one that you mean, as in ",
    ),
    "two documents": ("arena:\n---\narena:\n", ":2: not valid YAML: "),
    "python object": ("arena: !!python/object/apply:os.getcwd []\n", ":1: not valid YAML: could not determine"),
    "no such date": ("arena: {buffers: 2024-99-99}\n", ": not valid YAML: month must be in 1..12"),
    "key twice": (
        "arena:\n  buffers: 3\n  pin: auto\n  buffers: 4\n",
        ":4: arena.buffers: given twice, first on line 2",
    ),
    "section twice": ("arena:\n  buffers: 3\narena:\n  pin: auto\n", ":3: arena: given twice, first on line 1"),
    "key twice, deep": ("arena:\n  pin: {a: [{b: 1, b: 2}]}\n", ":2: arena.pin.a.0.b: given twice"),
    "control character": ("arena: \x00\n", ": not valid YAML: unacceptable character #x0000"),
    "nested too deep": ("[" * 1_000, ": not valid YAML: "),
}


@pytest.mark.parametrize(("text", "words"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_file_is_named_with_its_line(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    assert error_of(file).startswith(f"{file}{words}")


def test_unreadable_file_is_named(tmp_path: Path) -> None:
    assert error_of(tmp_path / "none.yaml") == (
        f"the configuration file {tmp_path}/none.yaml does not exist; give the right path, or make it by "
        f"`stager init {tmp_path}/none.yaml`"
    )
    assert error_of(tmp_path / "none" / "c.yaml").endswith("/none/c.yaml does not exist; give the right path")
    assert error_of("arena.buffers=3").startswith(
        "config: 'arena.buffers=3' is taken as the path of a YAML file, which"
    )
    assert error_of(tmp_path) == f"{tmp_path}: cannot be read: Is a directory"
    (tmp_path / "latin.yaml").write_bytes(b"arena: {pin: \xe9}")
    assert error_of(tmp_path / "latin.yaml").startswith(f"{tmp_path / 'latin.yaml'}: is not UTF-8 text")


def test_alias_and_merge_key_are_ordinary_yaml(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("arena: &a {buffers: 3}\nworkers: {<<: {nice: 3}, nice: 4}\n")
    config = load_config(tmp_path / "c.yaml", environ={})
    assert (config.arena.buffers, config.workers.nice) == (3, 4)


def test_file_that_contains_itself_ends_in_an_error_not_in_a_loop(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("arena: &a\n  pin: *a\n")
    assert error_of(tmp_path / "c.yaml").startswith(f"{tmp_path / 'c.yaml'}:2: arena.pin: got ")


def test_fields_have_descriptions() -> None:
    sections = [field.annotation for field in StagerConfig.model_fields.values()]
    fields = [f for section in sections for f in section.model_fields.values()]  # type: ignore[union-attr]  # models
    assert len(fields) > 20
    assert all(field.description for field in [*fields, *StagerConfig.model_fields.values()])


@pytest.mark.parametrize(
    ("count", "cores", "local_world_size", "expected"),
    [
        ("auto", 1, 1, 2),
        ("auto", 7, 1, 2),
        ("auto", 8, 1, 2),
        ("auto", 12, 1, 3),
        ("auto", 16, 1, 4),
        ("auto", 192, 1, 4),
        ("auto", 192, 2, 2),
        ("auto", 192, 8, 1),
        ("auto", 4, 2, 1),
        ("auto", 4, 0, 2),
        (3, 2, 8, 3),
    ],
)
def test_number_of_workers(count: Any, cores: int, local_world_size: int, expected: int) -> None:
    assert WorkersConfig(count=count).resolve_count(local_world_size, cores) == expected


def test_number_of_workers_on_this_host_is_at_least_one() -> None:
    assert 1 <= WorkersConfig().resolve_count() <= 4


@pytest.mark.parametrize(
    ("limit", "available", "local_world_size", "expected"),
    [
        ("75%", 1000, 1, 750),
        ("75%", 1000, 4, 187),
        ("100%", 1000, 1, 1000),
        ("12.5%", 8 << 30, 1, 1 << 30),
        ("8GiB", 1000, 4, 8 << 30),
        (123, 1000, 4, 123),
    ],
)
def test_memory_budget(limit: Any, available: int, local_world_size: int, expected: int) -> None:
    arena = load_config({"arena": {"max_host_bytes": limit}}, environ={}).arena
    assert arena.resolve_max_host_bytes(available, local_world_size) == expected
