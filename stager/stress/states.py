"""The unusual part of a state: rare dtypes, views, ties, empty tensors, pickled objects; they appear and disappear.

Its values at a step follow from its values at the step before (every byte of every tensor changes in every step), so that a
run that goes on from a wrong value cannot end with the right one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

LeafKind = Literal[
    "tensor", "tied", "slice", "transposed", "strided", "scalar", "empty", "object", "text", "set", "custom"
]

TENSOR_KINDS = frozenset({"tensor", "tied", "slice", "transposed", "strided", "scalar", "empty"})
DTYPES = (
    *("float32", "float64", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "complex64", "complex128", "bool"),
    *("uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64"),
)
NEVER = 1 << 30


@dataclass(frozen=True)
class LeafSpec:
    """One value of the state.

    Attributes:
        kind: what it is; ``tied``, ``slice``, ``transposed`` and ``strided`` are other views of the memory of ``base``.
        dtype, numel: of a tensor.
        base: the index of the leaf whose memory it shares; -1: its own.
        born, dies: the first step that has it, and the first that has it no more.
        resized: the step from which on it has twice as many elements, all new.
    """

    kind: LeafKind
    dtype: str = "float32"
    numel: int = 0
    base: int = -1
    born: int = 0
    dies: int = NEVER
    resized: int = NEVER

    def is_there(self, step: int) -> bool:
        """Whether the leaf exists after this step."""
        return self.born <= step < self.dies

    def numel_at(self, step: int) -> int:
        """Number of elements after this step."""
        return self.numel * 2 if step >= self.resized else self.numel

    @property
    def max_nbytes(self) -> int:
        """Largest size of the leaf, in bytes."""
        if self.kind not in TENSOR_KINDS or self.base >= 0:
            return 4096
        return self.numel * (2 if self.resized < NEVER else 1) * dtype_of(self.dtype).itemsize


class Custom:
    """An object that ``weights_only`` rules refuse."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.words = [f"word {i}" for i in range(step % 4)]


class Zoo:
    """The values of all leaves at a step.

    Attributes:
        values: by name; what a checkpoint holds.
    """

    def __init__(self, seed: int, specs: tuple[LeafSpec, ...], step: int) -> None:
        self._seed = seed
        self._specs = specs
        self._bases: dict[int, torch.Tensor] = {}
        self.values: dict[str, Any] = {}
        self._arrange(step)

    def advance(self, step: int) -> None:
        """Go on from the step before to ``step``."""
        for base in self._bases.values():
            _change(base)
        self._arrange(step)

    def _arrange(self, step: int) -> None:
        """Make the leaves that begin at ``step`` and drop those that end; the other tensors keep their identity."""
        for index, spec in enumerate(self._specs):
            name = f"{index}-{spec.kind}"
            if not spec.is_there(step):
                self.values.pop(name, None)
                self._bases.pop(index, None)
            elif spec.kind not in TENSOR_KINDS:
                self.values[name] = _object(spec.kind, step + index)
            elif name not in self.values or step == spec.resized:
                self.values[name] = self._tensor(index, spec, step)

    def _tensor(self, index: int, spec: LeafSpec, step: int) -> torch.Tensor:
        if spec.base >= 0:
            return _view(spec.kind, self._bases[spec.base])
        generator = torch.Generator().manual_seed(self._seed * 1000 + index * 2 + (step >= spec.resized))
        flat = random_bits(spec.dtype, spec.numel_at(step), generator)
        self._bases[index] = flat
        if spec.kind == "scalar":
            return flat.view(())
        if spec.kind == "empty":
            return flat.view(0, 3)
        return flat.view(-1, 8) if flat.numel() % 8 == 0 else flat


def dtype_of(name: str) -> torch.dtype:
    """The torch dtype of this name."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def random_bits(dtype: str, numel: int, generator: torch.Generator) -> torch.Tensor:
    """Return a flat tensor of random bits, which include NaNs and denormals."""
    if dtype == "bool":
        return torch.randint(0, 2, (numel,), generator=generator).bool()
    nbytes = numel * dtype_of(dtype).itemsize
    raw = torch.randint(0, 256, (nbytes,), generator=generator, dtype=torch.uint8)
    return raw.view(dtype_of(dtype)) if numel else torch.empty(0, dtype=dtype_of(dtype))


def _change(base: torch.Tensor) -> None:
    """Change every byte in place, whatever the dtype."""
    if base.dtype is torch.bool:
        base.logical_not_()
    elif base.numel():
        base.view(torch.uint8).add_(37)


def _view(kind: str, base: torch.Tensor) -> torch.Tensor:
    if kind == "tied":
        return base.view(-1, 8) if base.numel() % 8 == 0 else base
    if kind == "slice":
        return base[base.numel() // 3 : base.numel() // 3 * 2 + 1]
    if kind == "transposed":
        return base.view(-1, 8).t() if base.numel() % 8 == 0 else base[:1].view(1, 1).t()
    return base[::2]


def _object(kind: str, number: int) -> Any:
    if kind == "object":
        return ("tuple", number, [0.1 * number] * (number % 5))
    if kind == "text":
        return "grüße " * (number % 50)
    if kind == "set":
        return {number, number + 1}
    return Custom(number)
