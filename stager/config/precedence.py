"""From files, mappings, the environment and ``--set`` to one checked configuration.

Precedence, lowest first: defaults of the models < file or mapping < ``STAGER_<SECTION>__<KEY>`` < ``--set``.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Generic

from pydantic import BaseModel, ValidationError
from typing_extensions import TypeVar

from stager.config import layers, problems
from stager.config.layers import KeyPath, Layer
from stager.config.models import StagerConfig
from stager.workers.errors import ConfigError

ConfigSource = str | os.PathLike[str] | Mapping[str, Any] | StagerConfig | None

COMMAND_SECTIONS = frozenset({"demo", "stress"})
"""Sections that belong to one command. A file may be written for a command and read by a ``Checkpointer`` as well, so
whoever does not know these sections passes over them; the command's own model checks them."""

_M = TypeVar("_M", bound=StagerConfig, default=StagerConfig)


def load_config(
    config: ConfigSource = None,
    overrides: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
    *,
    model: type[_M] = StagerConfig,  # type: ignore[assignment]  # the default of _M
) -> _M:
    """Return the configuration to run with.

    Args:
        config: path of a YAML file; a mapping of sections (dicts, or omegaconf's); None for the defaults; or a model, which
            has been through this function or was made in code: it is taken as it is, and the environment does not change it.
        overrides: ``section.key=value``, as given to ``--set``; the value is a YAML scalar. The last one wins.
        environ: the environment; ``os.environ`` when None.
        model: ``StagerConfig`` or a subclass of it with more sections.

    Raises:
        ConfigError: an unknown key, a wrong type, an impossible value or unreadable YAML. It names the source (with the
            line, for a file), the key path, and what is allowed; every problem is listed, one per line.
    """
    on_top = [layers.override_layer(text, f"overrides[{i}] {text!r}") for i, text in enumerate(overrides)]
    return merged(config, on_top, environ, model)


def merged(config: ConfigSource, on_top: Sequence[Layer], environ: Mapping[str, str] | None, model: type[_M]) -> _M:
    """Return the configuration as :func:`load_config` does.

    Args:
        on_top: overrides; the last one wins.
    """
    if isinstance(config, StagerConfig):
        if isinstance(config, model) and not on_top:
            return config
        model = type(config) if isinstance(config, model) else model
        sources = [Layer("config", config.model_dump(exclude_unset=True))]  # a default stays one
    else:
        environ = os.environ if environ is None else environ
        _refuse_single_underscores(environ, model)
        sources = [*_base_layers(config), *layers.environment_layers(environ)]
    settings = _Merged(model)
    for layer in sources:
        settings.add(layer, passed_over=COMMAND_SECTIONS)
    for layer in on_top:
        settings.add(layer)
    return settings.validate()


def _base_layers(config: object) -> list[Layer]:
    if config is None:
        return []
    if isinstance(config, str | os.PathLike):
        return [layers.file_layer(os.fsdecode(config))]
    if isinstance(config, Mapping):
        return [layers.mapping_layer(config)]
    raise ConfigError(f"config: expected a path, a mapping, a StagerConfig or None, got {problems.shown(config)}")


def _refuse_single_underscores(environ: Mapping[str, str], model: type[StagerConfig]) -> None:
    """Refuse ``STAGER_ARENA_BUFFERS``, which would change nothing. A variable that is no section's may be anybody's.

    Raises:
        ConfigError: names the variable that was meant.
    """
    for name in sorted(environ):
        rest = name.removeprefix(layers.ENV_PREFIX).lower()
        if not name.startswith(layers.ENV_PREFIX) or "__" in rest:
            continue
        for section, field in model.model_fields.items():
            keys = problems.section_model(field)
            if keys is not None and rest.startswith(f"{section}_"):
                key = rest.removeprefix(f"{section}_")
                meant = f"{layers.ENV_PREFIX}{section}__{key if key in keys.model_fields else '<key>'}".upper()
                unknown = "" if key in keys.model_fields else "; " + problems.unknown_key(section, key, model)
                raise ConfigError(
                    f"environment variable {name}: two underscores stand between section and key; write {meant}{unknown}"
                )


class _Merged(Generic[_M]):
    """Layers put on top of each other, each value with the layer it came from."""

    def __init__(self, model: type[_M]) -> None:
        self._model = model
        self._values: dict[str, Any] = {}
        self._owners: dict[KeyPath, Layer] = {}
        self._problems: list[str] = []

    def add(self, layer: Layer, passed_over: Collection[str] = ()) -> None:
        """Put ``layer`` on top. Unknown sections and keys are noted for :meth:`validate`."""
        fields = self._model.model_fields
        for name, body in layer.values.items():
            if name in fields:
                self._add_section(layer, name, body)
            elif name not in passed_over:
                problem = problems.unknown_section(name, body, self._model, in_yaml=bool(layer.lines))
                self._note(layer, (str(name),), problem)

    def _add_section(self, layer: Layer, section: str, body: object) -> None:
        """Put what a layer says of one section on top: ``body``, from key to value. It is not checked yet."""
        section_model = problems.section_model(self._model.model_fields[section])
        if isinstance(body, BaseModel):
            body = body.model_dump(exclude_unset=True)
        if section_model is None:  # a field at the top that is a plain value, without keys
            self._values[section], self._owners[(section,)] = body, layer
        elif isinstance(body, Mapping):
            self._add_keys(layer, section, body, section_model.model_fields)
        elif body is not None:  # a section whose keys are all commented out is null
            self._note(layer, (section,), problems.not_a_section(section, body, section_model.model_fields))

    def _add_keys(self, layer: Layer, section: str, body: Mapping[Any, Any], known: Collection[str]) -> None:
        values = self._values.setdefault(section, {})
        for key, value in body.items():
            if key in known:
                values[key], self._owners[(section, key)] = value, layer
            else:
                self._note(layer, (section, str(key)), problems.unknown_key(section, key, self._model))

    def validate(self) -> _M:
        """Return the checked configuration; ConfigError lists every problem found in any layer."""
        try:
            config = self._model.model_validate(self._values)
        except ValidationError as error:
            first: dict[KeyPath, Any] = {}  # a union reports one error for each of its choices
            for one in error.errors(include_url=False):
                first.setdefault(tuple(map(str, one["loc"][:2])), one)
            for path, one in first.items():
                self._note_error(path, one)
        if self._problems:
            raise ConfigError("\n".join(self._problems))
        return config

    def _note(self, layer: Layer, path: KeyPath, message: str) -> None:
        self._problems.append(f"{layer.where(path)}: {message}")

    def _note_error(self, path: KeyPath, error: Any) -> None:
        owner = self._owners.get(path)
        reason = error["msg"].removeprefix("Value error, ") if error["type"] == "value_error" else ""
        if owner is None:  # a rule between the keys of a section, not one value
            where = ", ".join(dict.fromkeys(o.source for p, o in self._owners.items() if p[: len(path)] == path))
            self._problems.append(f"{where or 'config'}: {'.'.join(path)}: {reason or error['msg']}")
            return
        section = problems.section_model(self._model.model_fields[path[0]])
        field = section.model_fields[path[1]] if section and len(path) > 1 else None
        value = self._values[path[0]][path[1]] if len(path) > 1 else self._values[path[0]]
        self._note(owner, path, problems.wrong_value(path, value, field, reason or ("" if field else error["msg"])))
