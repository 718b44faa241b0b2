"""Arguments of calls: what is meant without doubt is taken, and anything else is one clear sentence.

torch is not imported here: a tensor is known by what it can do.
"""

from __future__ import annotations

import logging
import math
import operator
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from stager.config.sizes import SIZE_FORM, parse_bytes
from stager.workers.checkpoint.directory.run_directory import CheckpointInfo, checkpoint_names
from stager.workers.checkpoint.documents.names import parse_checkpoint
from stager.workers.checkpoint.storage.paths import place_path
from stager.workers.checkpoint.storage.places import resolved
from stager.workers.errors import ArgumentError, UsageError

logger = logging.getLogger("stager")

_SHOWN_CHARS = 40


def shown(value: object) -> str:
    """Return a value and its type for a message; of what is large, only the type."""
    kind = type(value).__name__
    text = repr(value) if isinstance(value, int | float | str | bytes | os.PathLike | None) else ""
    shape = f" of shape {tuple(value.shape)}" if hasattr(value, "shape") and hasattr(value, "dtype") else ""
    if value is None:
        return "None"
    return f"{text[:_SHOWN_CHARS]} ({kind})" if text else f"{_article(kind)} {kind}{shape}"


def _article(word: str) -> str:
    return "an" if word[:1].lower() in "aeiou" else "a"


def as_step(value: object, name: str = "step") -> int:
    """Return a training step: of an int, an integer of numpy's, or an integer tensor without dimensions.

    Raises:
        ArgumentError: it is something else, or negative.
    """
    step = _integer(value)
    if step is None:
        raise ArgumentError(f"{name} must be an integer of 0 or more, got {shown(value)}{_advice(value)}")
    if step < 0:
        raise ArgumentError(f"{name} must be an integer of 0 or more, got {step}")
    return step


def _integer(value: Any) -> int | None:
    if type(value) is int:
        return value
    is_bool = isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")
    if is_bool or not hasattr(value, "__index__") or tuple(getattr(value, "shape", ())):
        return None
    try:
        return operator.index(value)
    except TypeError:  # a tensor of another dtype
        return None


def _advice(value: Any) -> str:
    if isinstance(value, str):
        number = re.search(r"\d+\s*$", value, re.ASCII)
        return f"; write {int(number[0])}" if number else "; give the number of a step, such as 100"
    if math.prod(getattr(value, "shape", ())) != 1:
        return "; give one number"
    if (isinstance(value, float) and math.isfinite(value)) or hasattr(value, "item"):
        return "; convert it with int()"
    return ""


def as_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics as plain numbers: tensors of one element and numpy's numbers are read.

    Raises:
        ArgumentError: it is no mapping.
        UsageError: names the metric that is no number.
    """
    if not isinstance(metrics, Mapping):
        raise ArgumentError(
            f"metrics must be a mapping of names to numbers, got {shown(metrics)}; write "
            'save(step, state, metrics={"loss": loss})'
        )
    numbers = {}
    for name, value in metrics.items():
        try:
            # Of a tensor that requires grad, float() would warn.
            numbers[name] = float(value.detach() if hasattr(value, "detach") else value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UsageError(f"metrics[{name!r}] is {value!r}, which is no number; give a float") from error
        if not (isinstance(name, str) and name):
            raise UsageError(f"metrics has the key {name!r}; a metric's name is text")
    return numbers


def check_secs(value: object, name: str = "timeout") -> None:
    """Refuse what is no number of seconds, and not None.

    Raises:
        ArgumentError
    """
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool) and value >= 0):
        return
    raise ArgumentError(f"{name} must be a number of seconds, 0 or more, or None for no limit; got {shown(value)}")


def as_bytes(value: object, name: str) -> int:
    """Return a size, which is written as in the configuration: an integer, or text such as ``"1GiB"``.

    Raises:
        ArgumentError
    """
    try:
        return parse_bytes(value)
    except ValueError as error:
        raise ArgumentError(f"{name} must be {SIZE_FORM}; got {shown(value)}") from error


def each_of(values: Iterable[Any]) -> list[Any]:
    """Return the values, and in the place of a list, a tuple or a set what is in it."""
    return [one for value in values for one in (value if isinstance(value, list | tuple | set) else (value,))]


def check_save(step: object, state: object) -> None:
    """Refuse what is no state, and a state in the place of the step.

    Raises:
        ArgumentError: names the argument, and says what to write.
    """
    if is_state(step) and _integer(step) is None:
        got = f"got {shown(step)} as step" + (f" and {shown(state)} as state" if state is not None else "")
        raise ArgumentError(f"save() takes the step first, as in save(100, state); {got}")
    check_state(state, "save(100, {example})")


def check_state(state: object, call: str) -> None:
    """Refuse what is no mapping of names to values. ``call`` shows how to write it, with ``{example}`` in it."""
    if isinstance(state, Mapping):
        return
    if hasattr(state, "state_dict"):
        example = '{"optimizer": optimizer}' if hasattr(state, "param_groups") else '{"model": model}'
        advice = f"give it a name, as in {call.format(example=example)}"
    else:
        advice = f"give each value a name, as in {call.format(example=_EXAMPLE)}"
    raise ArgumentError(f"state must be a mapping, got {shown(state)}; {advice}")


_EXAMPLE = '{"model": model, "optimizer": optimizer}'


def is_state(value: object) -> bool:
    """Whether a value is a state, or an object that has one."""
    return isinstance(value, Mapping) or hasattr(value, "state_dict")


def load_arguments(step: object, into: object, directory: str) -> tuple[int | None, Any]:
    """Return which step to load, and into what: as they were given, or as they must have been meant.

    Args:
        step: a step; a checkpoint of this run by its path or its CheckpointInfo; None; or the state, if ``into`` is None.
        directory: of the run, absolute, or the path of the one checkpoint that is open.

    Raises:
        ArgumentError: one of them cannot be meant.
    """
    if is_state(step) and _integer(step) is None:
        if into is not None:
            got = f"got {shown(step)} as step and {shown(into)} as into"
            raise ArgumentError(f"load() takes the step first, as in load(100, into=state); {got}")
        step, into = None, step
    check_into(into)
    if step is None:
        return None, into
    if isinstance(step, CheckpointInfo):
        return _step_of_path(step.path, directory), into
    if (
        isinstance(step, os.PathLike)
        or (isinstance(step, str) and os.sep in step)
        or _names_checkpoint(step, directory)
    ):
        return _step_of_path(step, directory), into
    if isinstance(step, str) and step.strip().lower() in ("latest", "newest", "last"):
        raise ArgumentError(f"step is {step!r}; {_NEWEST}")
    if (number := _integer(step)) is not None and number < 0:
        raise ArgumentError(f"step must be an integer of 0 or more, got {number}; {_NEWEST}")
    return as_step(step), into


_NEWEST = "load() without a step loads the newest checkpoint"


def _names_checkpoint(value: object, directory: str) -> bool:
    return isinstance(value, str) and _step_of_name(value, directory) is not None


def _step_of_name(name: str, directory: str) -> int | None:
    """Return the step of the checkpoint of a name in a run; None: there is none, and the name is not a default one."""
    named = {other: step for step, other in checkpoint_names(directory).items()}
    return named.get(name, parse_checkpoint(name))


def check_into(into: object) -> None:
    """Refuse what is neither a mapping of names to values, nor an object that loads a state, nor None."""
    takes_state = hasattr(type(into), "state_dict") and hasattr(type(into), "load_state_dict")
    if isinstance(into, Mapping) and not into:
        logger.warning("into is empty, so nothing is restored into it; leave into out to get a new state")
    if into is None or isinstance(into, Mapping) or takes_state:
        return
    if isinstance(into, type):
        advice = f"{into.__name__} is a class: give an object of it, as in load(into={into.__name__}(...))"
    elif _integer(into) is not None:
        advice = f"load() takes the step first, as in load({_integer(into)}, into=state)"
    else:
        advice = f"write the names that were saved, as in load(into={_EXAMPLE})"
    raise ArgumentError(f"into must be a mapping or an object with load_state_dict(), got {shown(into)}; {advice}")


def _step_of_path(path: object, directory: str) -> int:
    """Return the step of the checkpoint at ``path``, which must be one of this run's."""
    if isinstance(path, str) and (step := _step_of_name(path, directory)) is not None:
        return step  # step-00000100, without the directory
    found = place_path(path, "step")
    parent, name = os.path.split(found)
    step = _step_of_name(name, parent)
    places = (parent, found)  # in the run, or the one checkpoint that is open
    if step is None or not any(resolved(place) == resolved(directory) for place in places):
        raise ArgumentError(
            f"step is the path {found}, which is no checkpoint of {directory}; give a step of this run, or read the path "
            "with stager.load_checkpoint(path)"
        )
    return step
