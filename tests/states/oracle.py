"""What torch.save and torch.load make of a state: what stager has to give."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import Any

import torch

from tests.states.corpus.registry import Expect, State


@dataclass(frozen=True)
class Oracle:
    """
    Attributes:
        value: what torch.load gives; the state itself if torch does not take it, because dcp.save may.
        is_safe: whether torch's weights_only rules allow it.
        error: of torch.save or torch.load.
    """

    value: Any = None
    is_safe: bool = False
    error: Exception | None = None


def ask(state: State) -> Oracle:
    """Save and load a new state with torch, unless it is known that it must be refused."""
    if state.expect is not Expect.EQUAL:
        return Oracle()
    made = (state.plain or state.build)()
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            torch.save(made, buffer)
            value = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
        except Exception as error:  # noqa: BLE001  # whatever the state's classes raise
            return Oracle((state.plain or state.build)(), error=error)
        try:
            torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
        except Exception:  # noqa: BLE001  # whatever is raised is what is looked for
            return Oracle(value, False)
        return Oracle(value, True)
