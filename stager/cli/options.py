"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

if TYPE_CHECKING:
    from stager.config import StagerConfig

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", "-c", metavar="FILE", help="YAML file with settings; without it, the defaults."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override one setting; may be repeated."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for scripts instead of tables.")]

_M = TypeVar("_M", bound="StagerConfig")


def load_settings(config: Path | None, overrides: Sequence[str] | None, model: type[_M]) -> _M:
    """Return the configuration that these options give."""
    from stager.config.layers import override_layer
    from stager.config.precedence import merged

    return merged(config, [override_layer(text, f"--set {text}") for text in overrides or ()], None, model)
