"""One source of settings: a file, a mapping, an environment variable or a ``--set``.

A layer holds what was written and where; it knows no models. ``precedence.py`` puts layers on top of each other.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from stager.workers.errors import ConfigError

ENV_PREFIX = "STAGER_"
_OPENED = {  # by what PyYAML says that it was reading
    "while parsing a flow mapping": "'{'",
    "while parsing a flow sequence": "'['",
    "while scanning a quoted scalar": "quote",
}
KeyPath = tuple[str, ...]


@dataclass(frozen=True)
class Layer:
    """Values by section and key.

    Attributes:
        source: as an error message names it: a path, ``config``, ``environment variable X``, ``--set a.b=c``.
        values: section -> key -> value; not checked yet, so a section may be anything.
        lines: for a file, the line of each section and key, from 1.
    """

    source: str
    values: Mapping[Any, Any]
    lines: Mapping[KeyPath, int] = field(default_factory=dict)

    def where(self, path: KeyPath) -> str:
        """``configs/run.yaml:12`` where the line is known, else the source."""
        line = self.lines.get(path)
        return self.source if line is None else f"{self.source}:{line}"


def mapping_layer(values: Mapping[Any, Any]) -> Layer:
    """Return the settings of a mapping, whatever its containers are: dicts, or omegaconf's ``DictConfig``.

    Raises:
        ConfigError: a value of it cannot be read: omegaconf's ``???`` or an interpolation that leads nowhere.
    """
    return Layer("config", _plain(values, ()))


def _plain(value: Any, path: KeyPath) -> Any:
    """Make dicts and lists of containers of other classes, which pydantic's strict types would refuse."""
    if isinstance(value, Mapping):
        return {key: _plain(_item(value, key, (*path, str(key))), (*path, str(key))) for key in value}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes | list | tuple):
        return [_plain(_item(value, i, (*path, str(i))), (*path, str(i))) for i in range(len(value))]
    return value


def _item(container: Any, key: Any, path: KeyPath) -> Any:
    try:
        return container[key]
    except Exception as error:  # omegaconf's own errors, of which there are several
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"config: {'.'.join(path)}: has no value: {reason}") from error


def file_layer(path: str) -> Layer:
    """Return the settings of a YAML file; an empty file has none. ConfigError says why it is no such file."""
    try:
        with open(path, encoding="utf-8") as file:
            values, lines = _parse(file.read(), path)
    except FileNotFoundError as error:
        raise ConfigError(_missing_file(path)) from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text: {error}") from error
    except yaml.MarkedYAMLError as error:
        mark, problem = _yaml_problem(error)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {problem}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(values, dict | None):
        raise ConfigError(f"{path}: must be a mapping of sections such as 'arena:', not a {type(values).__name__}")
    return Layer(path, values or {}, lines)


def _missing_file(path: str) -> str:
    """Say that a file does not exist, and what to do. A text may have been meant as a setting."""
    if "=" in path:
        return (
            f"config: {path!r} is taken as the path of a YAML file, which does not exist; give single settings as a "
            'mapping, as in {"arena": {"buffers": 3}}, or on the command line by --set'
        )
    file = os.path.abspath(path) if path else "''"
    make_it = f", or make it by `stager init {shlex.quote(path)}`" if os.path.isdir(os.path.dirname(file)) else ""
    return f"the configuration file {file} does not exist; give the right path{make_it}"


def _yaml_problem(error: yaml.MarkedYAMLError) -> tuple[Any, str]:
    """Return where the problem is, None if that is not known, and what it is. PyYAML says where it stopped reading."""
    problem = error.problem or error.context or ""
    ends = "<stream end>" in problem or "unexpected end of stream" in problem
    opened, at = _OPENED.get(error.context or ""), error.context_mark
    if opened and at and ends:
        return at, f"the {opened} that is opened here is not closed before the end of the file"
    if opened and at:
        problem += f" (is the {opened} of line {at.line + 1} closed?)"
    elif ends:
        problem = "a bracket is not closed before the end of the file"
    elif r"'\t'" in problem:
        problem += " (a tab; write spaces)"
    return error.problem_mark or at, problem


def _parse(text: str, source: str) -> tuple[Any, dict[KeyPath, int]]:
    """Return the document, and the line of each section and key."""
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        lines = _lines_of(node, source)  # first: it refuses a key given twice, of which the document has only the last
        return None if node is None else loader.construct_document(node), lines
    finally:
        loader.dispose()


def environment_layers(environ: Mapping[str, str]) -> Iterator[Layer]:
    """Make one layer for each ``STAGER_<SECTION>__<KEY>``, in the order of their names; ConfigError if it is not YAML."""
    for name in sorted(environ):
        section, separator, key = name.removeprefix(ENV_PREFIX).lower().partition("__")
        if name.startswith(ENV_PREFIX) and separator:
            source = f"environment variable {name}"
            yield Layer(source, {section: {key: _scalar(environ[name], source)}})


def override_layer(text: str, source: str) -> Layer:
    """Make the layer of one ``section.key=value``; ConfigError if it has another form, or is not YAML."""
    path, equals, value = text.partition("=")
    section, dot, key = path.strip().partition(".")
    if not (equals and dot and section and key):
        raise ConfigError(f"{source}: must have the form section.key=value, for example arena.buffers=3")
    return Layer(source, {section: {key: _scalar(value, source)}})


def _scalar(text: str, source: str) -> Any:
    """``"3"`` as 3, ``"true"`` as True, ``"64MiB"`` as it is: the types a YAML file would give."""
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: the value is not valid YAML; put quotes around text with : # or %") from error


def _lines_of(root: yaml.Node | None, source: str) -> dict[KeyPath, int]:
    """The line of each section and key.

    Raises:
        ConfigError: a key is given twice in one mapping, at any depth. YAML's own rule, which PyYAML does not enforce:
            it takes the last and drops the others.
    """
    lines: dict[KeyPath, int] = {}
    seen: set[int] = set()
    pending: list[tuple[KeyPath, yaml.Node | None]] = [((), root)]
    while pending:
        prefix, node = pending.pop()
        if id(node) in seen:  # an alias; it may even contain itself
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            pending.extend(((*prefix, str(i)), item) for i, item in enumerate(node.value))
        elif isinstance(node, yaml.MappingNode):
            children = _children(node, prefix, source)
            lines.update({path: line for path, line, _ in children})
            pending.extend((path, child) for path, _, child in children)
    return lines


def _children(node: yaml.MappingNode, prefix: KeyPath, source: str) -> list[tuple[KeyPath, int, yaml.Node]]:
    first_lines: dict[tuple[str, str], int] = {}
    children = []
    for key, value in node.value:
        line, path, identity = key.start_mark.line + 1, (*prefix, str(key.value)), (key.tag, str(key.value))
        if identity in first_lines:
            message = f"{'.'.join(path)}: given twice, first on line {first_lines[identity]}; keep one"
            raise ConfigError(f"{source}:{line}: {message}")
        first_lines[identity] = line
        if not prefix and isinstance(value, yaml.ScalarNode) and value.value:  # a section that is text, on its own line
            line = value.start_mark.line + 1
        children.append((path, line, value))
    return children
