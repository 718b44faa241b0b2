"""A configuration file with comments: what was chosen for a host is set, every other key is there with its default."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from stager.config import StagerConfig
from stager.planning.proposal import Choice

_COLUMNS = 110
_UNITS = ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


def settings_file(introduction: Sequence[str], choices: Sequence[Choice]) -> str:
    """Return the YAML.

    Args:
        introduction: paragraphs at the head of the file.
        choices: the keys that are set.
    """
    chosen = {(choice.section, choice.key): choice for choice in choices}
    lines = [line for paragraph in introduction for line in _comment(paragraph, "")]
    for name, field in StagerConfig.model_fields.items():
        lines += ["", f"{name}:  # {field.description}", *_section(name, field, chosen)]
    return "\n".join(lines) + "\n"


def _section(name: str, field: FieldInfo, chosen: dict[tuple[str, str], Choice]) -> Iterator[str]:
    model = field.annotation
    assert isinstance(model, type) and issubclass(model, BaseModel)
    for key, entry in model.model_fields.items():
        choice = chosen.get((name, key))
        if choice is not None:
            yield from _comment(f"{entry.description} Here: {choice.reason}.", "  ")
            yield f"  {key}: {_written(key, choice.value)}"
    for key, entry in model.model_fields.items():
        if (name, key) not in chosen:
            yield f"  # {key}: {_written(key, entry.default)}  # {entry.description}"


def _comment(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, _COLUMNS, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")


def _written(key: str, value: Any) -> str:
    """A value as a person would write it: ``64MiB``, not 67108864."""
    if type(value) is int and key.endswith("_bytes"):
        for factor, unit in _UNITS:
            if value and value % factor == 0:
                return f"{value // factor}{unit}"
    if type(value) is float and value.is_integer():
        value = int(value)
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n").strip()
