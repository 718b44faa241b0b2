"""omegaconf's containers (Hydra's configuration) are taken as a mapping is; stager does not import it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from stager import Checkpointer, ConfigError, load_config

omegaconf = pytest.importorskip("omegaconf", reason="the dev extra has it")
create = omegaconf.OmegaConf.create


def test_sections_values_lists_and_interpolations() -> None:
    whole = create(
        {
            "buffers": 3,
            "classes": ["a.B"],
            "stager": {
                "arena": {"buffers": "${buffers}", "max_host_bytes": "1GiB"},
                "retention": {"keep_latest": 2, "protect": [0, 100]},
                "loading": {"safe_globals": "${classes}"},
                "workers": None,
            },
        }
    )
    config = load_config(whole.stager)
    assert (config.arena.buffers, config.arena.max_host_bytes) == (3, 1 << 30)
    assert (config.retention.keep_latest, config.retention.protect) == (2, [0, 100])
    assert config.loading.safe_globals == ["a.B"]
    assert config == load_config(omegaconf.OmegaConf.to_container(whole.stager, resolve=True))


def test_section_of_omegaconf_in_a_dict() -> None:
    assert load_config({"arena": create({"buffers": 4})}).arena.buffers == 4


BAD: dict[str, tuple[Any, str]] = {
    "missing": ({"arena": {"buffers": "???"}}, r"config: arena\.buffers: has no value: .*arena\.buffers"),
    "nowhere": ({"arena": {"buffers": "${nowhere}"}}, r"config: arena\.buffers: has no value: .*nowhere"),
    "unknown": ({"arena": {"bufers": 3}}, r"arena\.bufers: unknown key; did you mean arena\.buffers"),
    "wrong": ({"arena": {"buffers": "many"}}, r"arena\.buffers: got 'many'"),
    "a list": ({"arena": [3]}, r"arena: got \[3\] .a list."),
}


@pytest.mark.parametrize(("values", "words"), BAD.values(), ids=BAD)
def test_what_is_wrong_is_named(values: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(create(values))


def test_whole_checkpointer(run_dir: Path) -> None:
    with Checkpointer(run_dir, create({"workers": {"count": 1}, "persistence": {"fsync": False}})) as ckpt:
        assert ckpt.latest() is None


def test_list_as_configuration_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected a path, a mapping"):
        load_config(create([1]))


def test_stager_does_not_import_it() -> None:
    from tests import scripts

    assert scripts.run("import sys, stager; stager.Checkpointer; assert 'omegaconf' not in sys.modules").returncode == 0
    assert "omegaconf" in sys.modules
