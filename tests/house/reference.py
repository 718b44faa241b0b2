"""The reference page of the configuration, made from the models.

python -m tests.house.reference > docs/configuration.md
"""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from stager.config.models import StagerConfig

_INTRODUCTION = """\
# Configuration

<!-- Made by `python -m tests.house.reference`; a test compares. -->

`Checkpointer(directory, config)` takes the path of a YAML file, a mapping, a `StagerConfig`, or None for the defaults.
A mapping may be made of dicts and lists, or of omegaconf's containers (`DictConfig`), as Hydra has them.
`configs/default.yaml` has every key with its default. Later wins:

1. the file or mapping
2. environment variables `STAGER_<SECTION>__<KEY>`, for example `STAGER_ARENA__BUFFERS=3` (one underscore is an error)
3. on the command line, `--set section.key=value`

An unknown key, a wrong type or an impossible value is a `ConfigError` that names the source (file and line, variable,
option) and the key path; the command line exits with 2. Sizes are bytes, or text such as `64MiB` or `1.5GB`.
In paths, `~` and `$VAR` are expanded.
"""


def reference() -> str:
    """The page as Markdown."""
    sections = [_section(name, field) for name, field in StagerConfig.model_fields.items()]
    return "\n".join([_INTRODUCTION, *sections])


def _section(name: str, field: FieldInfo) -> str:
    model = field.annotation
    assert isinstance(model, type) and issubclass(model, BaseModel)
    rows = [
        f"| `{key}` | {_default(entry.default)} | {_describe(entry)} |" for key, entry in model.model_fields.items()
    ]
    lines = [f"## {name}", "", field.description or "", "", "| key | default | meaning |", "| --- | --- | --- |", *rows]
    return "\n".join(lines) + "\n"


def _describe(entry: FieldInfo) -> str:
    choices = [value for value in get_args(entry.annotation) if isinstance(value, str)]
    listed = f" One of {', '.join(f'`{value}`' for value in choices)}." if len(choices) > 1 else ""
    return f"{entry.description}{listed}".replace("|", "\\|")


def _default(value: Any) -> str:
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return "`null`" if value is None else f"`{value}`"


if __name__ == "__main__":
    print(reference(), end="")
