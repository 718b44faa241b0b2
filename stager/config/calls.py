"""Calls that do not fit a signature: the error says what is missing, what was meant, or which setting it is.

Python's own message names only the argument that is wrong.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from stager.config.arguments import is_state, shown
from stager.config.models import StagerConfig
from stager.config.problems import section_model
from stager.workers.errors import ArgumentError

_P = ParamSpec("_P")
_R = TypeVar("_R")

# Arguments of other libraries.
_MEANT = {
    "blocking": "save(...).upload_completion.result() waits until the checkpoint is committed",
    "map_location": "leave it out: each tensor goes to the device of the tensor in into; without into, all go to the CPU",
    "weights_only": "the rules of weights_only hold unless you pass allow_pickle=True, which runs code from the checkpoint",
}
_SETTINGS = {  # by their names in other libraries
    "max_to_keep": "keep_latest",
    "save_total_limit": "keep_latest",
    "save_top_k": "keep_best",
}


def explained(example: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Decorate a public function: a call that does not fit its signature raises an ArgumentError that says what to write.

    Args:
        example: a call that fits.
    """

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        @wraps(function)
        def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            try:
                return function(*args, **kwargs)
            except TypeError as error:
                trace = error.__traceback__
                if trace is None or trace.tb_next is not None:  # raised in the function, so the call fits
                    raise
                raise ArgumentError(_problem(function, example, args, kwargs) or str(error)) from error

        return call

    return decorate


def _problem(
    function: Callable[..., Any], example: str, args: Sequence[object], kwargs: Mapping[str, object]
) -> str | None:
    parameters = dict(inspect.signature(function).parameters)
    if "." in function.__qualname__:  # a method
        parameters.pop("self", None)
        args = args[1:]
    call = f"{example.partition('(')[0]}()"
    for name in kwargs:
        if name not in parameters:
            return f"{call} has no argument {name}{_advice(name, list(parameters))}"
    positional = [one.name for one in parameters.values() if one.kind is one.POSITIONAL_OR_KEYWORD]
    if len(args) > len(positional):
        by_name = [one.name for one in parameters.values() if one.kind is one.KEYWORD_ONLY]
        return _too_many(call, args[len(positional) :], positional, by_name)
    if twice := [name for name in positional[: len(args)] if name in kwargs]:
        return f"{call} was given {twice[0]} twice, by position and by name; write it once, as in {example}"
    given = {*positional[: len(args)], *kwargs}
    needed = [
        one.name for one in parameters.values() if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD
    ]
    missing = [name for name in needed if name not in given]
    return _missing(call, example, args, needed, missing) if missing else None


def _missing(call: str, example: str, args: Sequence[object], needed: Sequence[str], missing: Sequence[str]) -> str:
    if needed[0] == "step" and args and is_state(args[0]):
        return f"{call} takes the step first, as in {example}; got {shown(args[0])} in the place of the step"
    lacks = f"{' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} missing"
    return f"{call} needs {' and '.join(needed)}, as in {example}; {lacks}"


def _too_many(call: str, extra: Sequence[object], positional: Sequence[str], by_name: Sequence[str]) -> str:
    takes = f"takes only {' and '.join(positional)} by position" if positional else "takes nothing by position"
    if not by_name:
        return f"{call} {takes}"
    values = [repr(value) if isinstance(value, bool | int | float | str | None) else "..." for value in extra]
    meant = ", ".join(f"{name}={value}" for name, value in zip(by_name, values, strict=False))
    return f"{call} {takes}; write {meant} if that is what you mean (arguments by name: {', '.join(by_name)})"


def _advice(name: str, known: Sequence[str]) -> str:
    setting = _SETTINGS.get(name, name)
    for section, field in StagerConfig.model_fields.items():
        fields = section_model(field)
        if fields is not None and setting in fields.model_fields:
            example = f'Checkpointer(directory, {{"{section}": {{"{setting}": ...}}}})'
            return f"; {section}.{setting} is a setting of the configuration: {example}"
    if meant := _MEANT.get(name):
        return f"; {meant}"
    if near := difflib.get_close_matches(name, known, n=1):
        return f"; did you mean {near[0]}?"
    return f" (it has: {', '.join(known)})" if known else "; it takes none"
