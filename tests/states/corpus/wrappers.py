"""Subclasses of tensors, and tensors around tensors."""

from __future__ import annotations

import contextlib
import os
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.utils import _pytree as pytree

from tests.states.corpus.registry import Expect, state, values
from tests.states.corpus.tensors import rand


class Plain(torch.Tensor):
    """A subclass that adds nothing."""


class Named(torch.Tensor):
    """A subclass with an attribute, as fastai's and monai's."""

    label: str


class Slotted(torch.Tensor):
    __slots__ = ("label",)


class OwnParameter(torch.nn.Parameter):
    """As vLLM's and peft's."""


class OwnReduce(torch.Tensor):
    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild_own, (self.as_subclass(torch.Tensor).detach(),)


def _rebuild_own(data: torch.Tensor) -> OwnReduce:
    return data.as_subclass(OwnReduce)


class TwoTensors(torch.Tensor):
    """A wrapper of two tensors and a number, made as torch's own test class and torchao's classes are."""

    a: torch.Tensor
    b: torch.Tensor
    factor: float

    @staticmethod
    def __new__(cls, a: torch.Tensor, b: torch.Tensor, factor: float = 1.0) -> TwoTensors:
        made: Any = torch.Tensor._make_wrapper_subclass(
            cls, a.size(), strides=a.stride(), dtype=a.dtype, device=a.device, requires_grad=a.requires_grad
        )
        made.a, made.b, made.factor = a, b, factor
        wrapper: TwoTensors = made
        return wrapper

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["a", "b"], {"factor": self.factor}

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, torch.Tensor], context: Any, size: Any, stride: Any) -> TwoTensors:
        return cls(inner["a"], inner["b"], context["factor"])

    def __repr__(self, **_: Any) -> str:
        return f"TwoTensors({self.a}, {self.b}, {self.factor})"

    @classmethod
    def __torch_dispatch__(cls, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        of_a = pytree.tree_map_only(TwoTensors, lambda one: one.a, args)
        of_b = pytree.tree_map_only(TwoTensors, lambda one: one.b, args)
        factor = next(one.factor for one in pytree.tree_leaves(args) if isinstance(one, TwoTensors))
        out_a, out_b = function(*of_a, **kwargs), function(*of_b, **kwargs)
        if isinstance(out_a, torch.Tensor) and isinstance(out_b, torch.Tensor):
            if function is torch.ops.aten.copy_.default:
                return args[0]
            return TwoTensors(out_a, out_b, factor)
        return out_a


class Silent(torch.Tensor):
    """A wrapper that does not say what it wraps."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Silent:
        made: Any = torch.Tensor._make_wrapper_subclass(cls, inner.size(), dtype=inner.dtype)
        made.inner = inner
        wrapper: Silent = made
        return wrapper

    def __repr__(self, **_: Any) -> str:
        return "Silent()"

    @classmethod
    def __torch_dispatch__(cls, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        unwrapped = pytree.tree_map_only(Silent, lambda one: one.inner, args)
        return function(*unwrapped, **(kwargs or {}))


def _named() -> Named:
    made = rand(3).as_subclass(Named)
    made.label = "x"
    return made


def _slotted() -> Slotted:
    made = rand(3).as_subclass(Slotted)
    made.label = "x"  # type: ignore[misc]  # set on purpose
    return made


def _two() -> TwoTensors:
    return TwoTensors(rand(3, 2), rand(3, 2, seed=1), 2.5)


values(
    "subclasses",
    {
        "subclass": lambda: rand(3, 2).as_subclass(Plain),
        "subclass-attribute": _named,
        "subclass-slot": _slotted,
        "subclass-of-parameter": lambda: OwnParameter(rand(3)),
        "subclass-transposed": lambda: rand(3, 2).as_subclass(Plain).t(),
        "subclass-own-reduce": lambda: rand(3).as_subclass(OwnReduce),
        "subclass-in-tuple": lambda: (1, _named()),
        "subclass-parameter": lambda: torch.nn.Parameter(_named()),
    },
)


def _masked() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.masked.masked_tensor(rand(3), torch.tensor([True, False, True]))


values("subclasses", {"uninitialized-parameter": torch.nn.UninitializedParameter}, expect=Expect.REFUSED)


@state("uninitialized-lazy-linear", "subclasses", expect=Expect.REFUSED)
def _lazy() -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {"model": torch.nn.LazyLinear(3)}


values(
    "wrapper subclasses",
    {
        "wrapper": _two,
        "wrapper-parameter": lambda: torch.nn.Parameter(_two()),
        "wrapper-of-views": lambda: TwoTensors(rand(4, 3)[:2], rand(4, 3)[1:3], 1.0),
        "wrapper-in-list": lambda: [_two(), 1],
        "wrapper-in-tuple": lambda: (_two(), 1),
        "wrapper-of-wrapper": lambda: TwoTensors(_two(), _two()),
        "wrapper-large": lambda: TwoTensors(rand(600, 600), rand(600, 600, seed=1)),
        "wrapper-silent": lambda: Silent(rand(3)),
        "masked-tensor": _masked,
    },
    is_dangerous=True,
)


def _wrapper_freed() -> TwoTensors:
    made = _two()
    made.b.untyped_storage().resize_(0)
    return made


values("wrapper subclasses", {"wrapper-freed-inner": _wrapper_freed}, expect=Expect.REFUSED, is_dangerous=True)


@state("wrapper-tied", "wrapper subclasses", is_dangerous=True)
def _wrapper_tied() -> dict[str, Any]:
    made = _two()
    return {"a": made, "b": made, "inner": made.a}


def _fake() -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.empty(1000)


def _fake_module() -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.nn.Linear(300, 300).state_dict()


class _Left(Exception):
    """A function that is transformed was left before its end: no backward pass runs. The first one of a process starts a
    thread for each kind of device, and with torch 2.14.1 these may end the process ("Invalid thread pool!")."""


def _inside(transform: Any) -> Any:
    caught: list[torch.Tensor] = []

    def function(x: torch.Tensor) -> torch.Tensor:
        caught.append(x)
        raise _Left

    with contextlib.suppress(_Left):
        transform(function)(rand(3))
    return caught[0]


def _functional() -> Any:
    return torch._to_functional_tensor(rand(3))


values(
    "fake and functorch",
    {
        "fake": _fake,
        "fake-module": _fake_module,
        "fake-in-tuple": lambda: (1, _fake()),
        "fake-copied-parameter": lambda: torch.nn.Parameter(_fake()),
        "vmap-escaped": lambda: _inside(torch.vmap),
        "grad-escaped": lambda: _inside(torch.func.grad),
        "grad-escaped-in-list": lambda: [rand(1), (_inside(torch.func.grad),)],
        "functional-tensor": _functional,
    },
    expect=Expect.REFUSED,
    is_dangerous=True,
)


# -- other packages ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _quantized_linear(config: str, **arguments: Any) -> dict[str, Any]:
    with _quiet():
        from torchao import quantization

        model = torch.nn.Sequential(torch.nn.Linear(64, 32, bias=False)).to(torch.bfloat16)
        quantization.quantize_(model, getattr(quantization, config)(**arguments))
        return model.state_dict()


def _nf4() -> Any:
    with _quiet():
        from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

        return to_nf4(rand(256, 256).to(torch.bfloat16))


def _not_compiled(function: Any = None, **options: Any) -> Any:
    """In place of torch.compile, which would start a compiler."""
    return _not_compiled if function is None else function


def _low_bit(name: str) -> dict[str, Any]:
    """The state of a low-bit optimizer after a step."""
    with _quiet():
        from torchao import optim

        model = torch.nn.Linear(64, 64)
        optimizer = getattr(optim, name)(model.parameters(), lr=1e-3)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        with mock.patch("torch.compile", _not_compiled):
            optimizer.step()
        return optimizer.state_dict()


def _low_bit_tensor(name: str) -> Any:
    with _quiet():
        import torchao.optim.subclass_4bit as bits4
        import torchao.optim.subclass_8bit as bits8
        import torchao.optim.subclass_fp8 as fp8

        made = {"4bit": bits4.OptimState4bit, "8bit": bits8.OptimState8bit, "fp8": fp8.OptimStateFp8}[name]
        return made.zeros((64, 64))


values(
    "torchao",
    {
        "torchao-int8-weight-only": lambda: _quantized_linear("Int8WeightOnlyConfig"),
        "torchao-float8-weight-only": lambda: _quantized_linear("Float8WeightOnlyConfig"),
        "torchao-int8-dynamic": lambda: _quantized_linear("Int8DynamicActivationInt8WeightConfig"),
        "torchao-nf4": _nf4,
        "torchao-adamw-8bit": lambda: _low_bit("AdamW8bit"),
        "torchao-adamw-4bit": lambda: _low_bit("AdamW4bit"),
        "torchao-adamw-fp8": lambda: _low_bit("AdamWFp8"),
        "torchao-optim-state-4bit": lambda: _low_bit_tensor("4bit"),
        "torchao-optim-state-8bit": lambda: _low_bit_tensor("8bit"),
        "torchao-optim-state-fp8": lambda: _low_bit_tensor("fp8"),
    },
    needs=("torchao",),
    is_dangerous=True,
)


def _tensordict() -> Any:
    from tensordict import TensorDict

    return TensorDict({"a": rand(3, 2), "b": {"c": rand(3)}}, batch_size=[3])


values(
    "tensordict",
    {
        "tensordict": _tensordict,
        "tensordict-in-list": lambda: [_tensordict(), 1],
        "tensordict-state-dict": lambda: _tensordict().state_dict(),
    },
    needs=("tensordict",),
    is_dangerous=True,
)


# -- DTensor of one rank ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def one_rank() -> Iterator[None]:
    """A process group of this process alone."""
    import torch.distributed as dist

    path = os.path.join(tempfile.mkdtemp(), "store")
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.FileStore(path, 1))
    try:
        yield
    finally:
        dist.destroy_process_group()
        os.unlink(path)
        os.rmdir(os.path.dirname(path))


def _dtensor(local: torch.Tensor, *, replicated: bool = False) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh = init_device_mesh("cpu", (1,))
    return DTensor.from_local(local, mesh, [Replicate() if replicated else Shard(0)], run_check=False)


values(
    "DTensor of one rank",
    {
        "dtensor-shard": lambda: _dtensor(rand(4, 3)),
        "dtensor-replicate": lambda: _dtensor(rand(4, 3), replicated=True),
        "dtensor-parameter": lambda: torch.nn.Parameter(_dtensor(rand(4, 3))),
        "dtensor-of-wrapper": lambda: _dtensor(_two()),
    },
    world=one_rank,
    is_dangerous=True,
)
