"""Values that are there twice: tied tensors, views of one storage, shared objects, cycles."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch

from tests.states.corpus.registry import state
from tests.states.corpus.tensors import rand

_KIND = "aliasing"


@state("tied-same-object", _KIND)
def _tied() -> dict[str, Any]:
    weight = rand(5, 3)
    return {"embed": weight, "head": weight}


@state("tied-other-object", _KIND)
def _tied_objects() -> dict[str, Any]:
    weight = rand(5, 3)
    return {"embed": weight, "head": weight.detach()}


@state("tied-transposed", _KIND)
def _tied_transposed() -> dict[str, Any]:
    weight = rand(5, 3)
    return {"embed": weight, "head": weight.t()}


@state("tied-parameter-and-data", _KIND)
def _tied_parameter() -> dict[str, Any]:
    weight = torch.nn.Parameter(rand(5, 3))
    return {"parameter": weight, "data": weight.data}


@state("views-overlapping", _KIND)
def _overlapping() -> dict[str, Any]:
    base = rand(6, 8)
    return {"a": base[1:4], "b": base[3:6], "c": base[:, 2]}


@state("views-disjoint", _KIND)
def _disjoint() -> dict[str, Any]:
    flat = rand(30)  # a flat buffer, as DDP's and DeepSpeed's
    return {"flat": flat, "a": flat[:10].view(2, 5), "b": flat[10:]}


@state("views-of-other-dtype", _KIND)
def _reinterpreted() -> dict[str, Any]:
    base = rand(6)
    return {"base": base, "bits": base.view(torch.int32)}


@state("tied-across-containers", _KIND)
def _across() -> dict[str, Any]:
    weight = rand(5)
    return {"model": {"w": weight}, "list": [weight, 1], "tuple": (weight, 2)}


@state("tied-in-tuples", _KIND)
def _in_tuples() -> dict[str, Any]:
    weight = rand(5)
    return {"a": (weight,), "b": (weight, weight)}


@state("tied-empty", _KIND)
def _empty() -> dict[str, Any]:
    weight = torch.empty(0, 3)
    return {"a": weight, "b": weight}


@state("tied-sparse", _KIND)
def _sparse() -> dict[str, Any]:
    weight = torch.eye(3).to_sparse()
    return {"a": weight, "b": weight}


@state("shared-dict", _KIND)
def _shared_dict() -> dict[str, Any]:
    settings = {"lr": 0.1, "w": rand(2)}
    return {"a": settings, "b": settings}


@state("shared-list", _KIND)
def _shared_list() -> dict[str, Any]:
    numbers = [1, 2, 3]
    return {"a": numbers, "b": numbers, "c": [rand(2), numbers]}


@state("shared-object", _KIND)
def _shared_object() -> dict[str, Any]:
    value = OrderedDict(a=1)
    return {"a": (value,), "b": [value], "c": value}


_CYCLES = "cycles and depth"


@state("cycle-dict", _CYCLES)
def _cycle_dict() -> dict[str, Any]:
    inner: dict[str, Any] = {"a": 1}
    inner["self"] = inner
    return {"x": inner}


@state("cycle-list", _CYCLES)
def _cycle_list() -> dict[str, Any]:
    inner: list[Any] = [1]
    inner.append(inner)
    return {"x": inner}


@state("cycle-list-with-tensor", _CYCLES)
def _cycle_tensor() -> dict[str, Any]:
    inner: list[Any] = [rand(2)]
    inner.append(inner)
    return {"x": inner}


@state("cycle-through-the-state", _CYCLES)
def _cycle_state() -> dict[str, Any]:
    whole: dict[str, Any] = {"w": rand(2)}
    whole["parent"] = whole
    return whole


@state("cycle-through-tuple", _CYCLES)
def _cycle_tuple() -> dict[str, Any]:
    inner: list[Any] = []
    inner.append((inner, 1))
    return {"x": inner}


def _nested(depth: int, wrap: Any, value: Any) -> dict[str, Any]:
    for _ in range(depth):
        value = wrap(value)
    return {"x": value}


@state("deep-dicts-50", _CYCLES)
def _deep_50() -> dict[str, Any]:
    return _nested(50, lambda value: {"k": value}, rand(2))


@state("deep-dicts-120", _CYCLES)
def _deep_120() -> dict[str, Any]:
    return _nested(120, lambda value: {"k": value}, rand(2))


@state("deep-dicts-without-tensor-200", _CYCLES)
def _deep_plain() -> dict[str, Any]:
    return _nested(200, lambda value: {"k": value}, 1)


@state("deep-lists-200", _CYCLES)
def _deep_lists() -> dict[str, Any]:
    return _nested(200, lambda value: [value], 1)


@state("deep-lists-with-tensor-120", _CYCLES)
def _deep_tensor_lists() -> dict[str, Any]:
    return _nested(120, lambda value: [value], rand(2))


@state("deep-tuples-200", _CYCLES)
def _deep_tuples() -> dict[str, Any]:
    return _nested(200, lambda value: (value,), 1)
