"""One hash for a whole state: names, types, shapes, bits, and which names are the same memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import xxhash

from stager.stress.states import Custom


def digest(state: Mapping[str, Any]) -> str:
    """Return a hash that is equal exactly for equal states. An object with ``state_dict()`` counts as its state dict."""
    return Digest(state).total


class Digest:
    """The hashes of a state.

    Attributes:
        total: the hash of everything.
        parts: the hash of each leaf, by its path.
    """

    def __init__(self, state: Mapping[str, Any]) -> None:
        self.parts: dict[str, str] = {}
        self._alive: list[torch.Tensor] = []  # otherwise a later tensor could have the address of an earlier one
        self._first_at: dict[tuple[object, ...], str] = {}
        self._visit("", state)
        hasher = xxhash.xxh3_128()
        for path in sorted(self.parts):
            hasher.update(f"{path}={self.parts[path]};".encode())
        self.total = hasher.hexdigest()

    def _visit(self, path: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            self.parts[path] = f"{_of_tensor(value)} {self._tied_to(path, value)}"
        elif hasattr(value, "state_dict"):
            self._visit(path, value.state_dict())
        elif isinstance(value, Mapping):
            self.parts[path] = f"mapping of {len(value)}"
            for key in sorted(value, key=repr):
                self._visit(f"{path}.{key!r}", value[key])
        elif isinstance(value, (list, tuple)):
            self.parts[path] = f"{type(value).__name__} of {len(value)}"
            for index, child in enumerate(value):
                self._visit(f"{path}.{index}", child)
        elif isinstance(value, Custom):
            self._visit(path + ".vars", vars(value))
        else:
            self.parts[path] = _of_plain(value)

    def _tied_to(self, path: str, tensor: torch.Tensor) -> str:
        """The first name of exactly this memory."""
        if not tensor.numel():
            return ""
        self._alive.append(tensor)
        place = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        return self._first_at.setdefault(place, path)


def _of_tensor(tensor: torch.Tensor) -> str:
    dense = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    dense = dense.as_strided(dense.shape, (1,))  # one element may have any stride
    data = dense.view(torch.uint8).numpy().data if dense.numel() else b""
    return f"{tensor.dtype} {list(tensor.shape)} {xxhash.xxh3_128_hexdigest(data)}"


def _of_plain(value: Any) -> str:
    if isinstance(value, float):
        return f"float {value.hex()}"
    if isinstance(value, (set, frozenset)):
        return f"set {sorted(map(repr, value))}"
    return f"{type(value).__name__} {value!r}"
