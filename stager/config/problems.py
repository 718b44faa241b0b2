"""How a configuration error is worded: where, which key, what was given, what is allowed, what was probably meant."""

from __future__ import annotations

import difflib
import json
import re
import types
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from stager.config.sizes import Allowed

_KINDS = {
    bool: "a boolean",
    int: "an integer",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a mapping",
    type(None): "nothing",
}
_WRITTEN = {None: "null", True: "true", False: "false"}
_MAX_SHOWN_CHARS = 60


def section_model(field: FieldInfo) -> type[BaseModel] | None:
    """The model of a section; None for a field that is a plain value."""
    annotation = field.annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def unknown_section(name: object, value: object, model: type[BaseModel], *, in_yaml: bool) -> str:
    """Say that there is no section of this name, and what must have been meant.

    Args:
        value: what was given for it.
        in_yaml: it was given in a YAML file.
    """
    sections = list(model.model_fields)
    with_key = [path.partition(".")[0] for path in _key_paths(model, name)]
    if with_key and not isinstance(value, Mapping):
        return _without_section(name, value, with_key, in_yaml=in_yaml)
    suggestion = difflib.get_close_matches(str(name), sections, n=1) or _key_paths(model, name)
    return f"{name}: unknown section{_did_you_mean(suggestion)} (sections: {', '.join(sections)})"


def _without_section(name: object, value: object, sections: Sequence[str], *, in_yaml: bool) -> str:
    """Say that a key stands where sections do, and how to write it."""
    of, write = f"the section {sections[0]}", "write"
    if len(sections) > 1:
        of, write = f"the sections {', '.join(sections)}", "write it in the one that you mean, as in"
    text = "..."
    if value is None or isinstance(value, bool | int | float | str):
        text = json.dumps(value) if in_yaml else repr(value)
    example = f"`{sections[0]}:` and below it, indented, `{name}: {text}`"
    if not in_yaml:
        example = f'{{"{sections[0]}": {{"{name}": {text}}}}}'
    return f"{name}: is a key of {of}; {write} {example}"


def unknown_key(section: str, key: object, model: type[BaseModel]) -> str:
    fields = section_model(model.model_fields[section])
    keys = list(fields.model_fields) if fields else []
    near = [f"{section}.{k}" for k in difflib.get_close_matches(str(key), keys, n=1)]
    suggestion = _did_you_mean(_key_paths(model, key) or near)
    return f"{section}.{key}: unknown key{suggestion} (keys of {section}: {', '.join(keys)})"


def not_a_section(section: str, body: object, keys: Collection[str]) -> str:
    """Say that a section is no mapping. ``buffers:3``, without a space, is text in YAML."""
    pair = re.match(r"(\w+):(\S+)", body) if isinstance(body, str) else None
    if pair is not None and pair[1] in keys:
        return f"{section}: {body!r} is text; put a space after the colon: {pair[1]}: {pair[2]}"
    return f"{section}: got {shown(body)}; a section is a mapping of keys to values"


def wrong_value(path: Sequence[str], value: object, field: FieldInfo | None, reason: str) -> str:
    """``arena.buffers: got 1 (an integer); allowed: an integer of at least 2``."""
    given = f"got {shown(value)}"
    if reason:
        given = reason if repr(value) in reason else f"{given}: {reason}"
    allowed = f"; allowed: {allowed_text(field.annotation, field.metadata)}{_as_list(value, field)}" if field else ""
    return f"{'.'.join(path)}: {given}{allowed}"


def _as_list(value: object, field: FieldInfo) -> str:
    """Say how to write the list of this one value, if that is allowed."""
    annotation: Any = field.annotation
    if get_origin(annotation) is not list:
        return ""
    try:
        TypeAdapter(annotation).validate_python([value], strict=True)
    except ValidationError:
        return ""
    return f"; write {json.dumps([value])}"


def shown(value: object) -> str:
    """A value as its author would recognise it, with its type where that may be the mistake."""
    text = _WRITTEN[value] if value is None or isinstance(value, bool) else repr(value)
    if len(text) > _MAX_SHOWN_CHARS:
        text = text[:_MAX_SHOWN_CHARS] + "..."
    return f"{text} ({_KINDS.get(type(value), type(value).__name__)})"


def allowed_text(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """What a field accepts, from its annotation, so that message and check cannot differ."""
    if get_origin(annotation) is Annotated:
        inner, *extra = get_args(annotation)
        return allowed_text(inner, [*metadata, *extra])
    marks = [mark for item in metadata for mark in (item.metadata if isinstance(item, FieldInfo) else [item])]
    bounds = _bounds_text(marks)
    for worded in (mark.text for mark in marks if isinstance(mark, Allowed)):
        return f"{worded},{bounds}" if bounds else worded
    return _type_text(annotation) + bounds


def _type_text(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is Literal:
        return _joined([f'"{choice}"' for choice in get_args(annotation)])
    if origin in (Union, types.UnionType):
        return _joined([allowed_text(choice) for choice in get_args(annotation)])
    if annotation is bool:
        return "true or false"
    if annotation is type(None):
        return "null"
    return _KINDS.get(origin or annotation, str(annotation))


def _bounds_text(marks: Iterable[Any]) -> str:
    bounds = {name: getattr(mark, name) for mark in marks for name in ("ge", "gt", "le", "lt") if hasattr(mark, name)}
    if "ge" in bounds and "le" in bounds:
        return f" from {bounds['ge']} to {bounds['le']}"
    words = {"ge": "of at least", "gt": "above", "le": "of at most", "lt": "below"}
    return "".join(f" {words[name]} {bound}" for name, bound in bounds.items())


def _joined(choices: Sequence[str]) -> str:
    return " or ".join([", ".join(choices[:-1]), choices[-1]] if len(choices) > 1 else choices)


def _key_paths(model: type[BaseModel], key: object) -> list[str]:
    """The sections that have this key: ``["arena.pin"]``."""
    sections = ((name, section_model(field)) for name, field in model.model_fields.items())
    return [f"{name}.{key}" for name, section in sections if section is not None and key in section.model_fields]


def _did_you_mean(suggestions: Sequence[str]) -> str:
    return f"; did you mean {suggestions[0]}?" if suggestions else ""
