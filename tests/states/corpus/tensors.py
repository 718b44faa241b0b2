"""Plain tensors: dtypes, shapes, strides, views, flags and attributes."""

from __future__ import annotations

from typing import Any

import torch

from tests.states import DTYPES, random_tensor
from tests.states.corpus.registry import state, values


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed))


def _of_dtype(dtype: torch.dtype) -> Any:
    return lambda: random_tensor(dtype, (3, 5), generator())


values("dtypes", {f"dtype-{str(dtype).removeprefix('torch.')}": _of_dtype(dtype) for dtype in DTYPES})
values(
    "dtypes",
    {
        f"dtype-{name}": _of_dtype(getattr(torch, name))
        for name in ("float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "complex32")
        if hasattr(torch, name)
    },
)
if hasattr(torch, "float4_e2m1fn_x2"):
    values("dtypes", {"dtype-float4": lambda: torch.arange(8, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)})

values(
    "shapes and strides",
    {
        "scalar": lambda: torch.tensor(3.5),
        "nan-payloads": lambda: torch.tensor([0x7FC00001, 0xFFC12345 - (1 << 32)], dtype=torch.int32).view(
            torch.float32
        ),
        "empty": lambda: torch.empty(0),
        "empty-of-shape": lambda: torch.empty(4, 0, 3),
        "empty-transposed": lambda: torch.empty(4, 0, 3).transpose(0, 2),
        "transposed": lambda: rand(4, 6).t(),
        "channels-last": lambda: rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "channels-last-3d": lambda: rand(2, 3, 2, 4, 5).to(memory_format=torch.channels_last_3d),
        "row-of-matrix": lambda: rand(6, 8)[2],
        "column-of-matrix": lambda: rand(6, 8)[:, 3],
        "every-second": lambda: rand(6, 8)[::2, 1::3],
        "expanded": lambda: rand(1, 8).expand(4, 8),
        "expanded-scalar": lambda: torch.tensor(2.0).expand(3, 3),
        "as-strided-overlapping": lambda: rand(20).as_strided((4, 4), (3, 2)),
        "unfolded": lambda: rand(10).unfold(0, 4, 2),
        "diagonal": lambda: rand(5, 5).diagonal(),
        "permuted": lambda: rand(2, 3, 4).permute(2, 0, 1),
        "one-element-odd-stride": lambda: rand(9).as_strided((1, 1), (7, 5), 3),
        "zero-dim-of-view": lambda: rand(9)[4],
        "many-dims": lambda: rand(*[1] * 20, 2, 3),
        "unaligned-view": lambda: torch.arange(33, dtype=torch.uint8)[1:].view(torch.uint8),
        "view-of-other-dtype": lambda: rand(4, 4).view(torch.int16),
        "real-of-complex": lambda: torch.view_as_real(torch.complex(rand(3), rand(3, seed=1))),
        "imag-part": lambda: torch.complex(rand(3), rand(3, seed=1)).imag,
        "conj": lambda: torch.complex(rand(3, 2), rand(3, 2, seed=1)).conj(),
        "conj-transposed": lambda: torch.complex(rand(3, 2), rand(3, 2, seed=1)).mH,
        "neg": lambda: torch.complex(rand(3), rand(3, seed=1)).conj().imag,
        "conj-and-neg": lambda: torch._neg_view(torch.complex(rand(3), rand(3, seed=1)).conj()),
    },
)


def _with_grad() -> torch.Tensor:
    weight = torch.nn.Parameter(rand(3))
    weight.square().sum().backward()
    return weight


def _with_hook() -> torch.Tensor:
    weight = rand(3).requires_grad_()
    weight.register_hook(_double)
    return weight


def _double(grad: torch.Tensor) -> torch.Tensor:
    return grad * 2


def _with_attributes() -> torch.Tensor:
    weight = torch.nn.Parameter(rand(3))
    vars(weight).update(is_expert=True, scale=torch.tensor(2.0))  # as Megatron marks its parameters
    return weight


def _frozen_parameter() -> torch.Tensor:
    return torch.nn.Parameter(rand(3), requires_grad=False)


def _in_inference_mode() -> torch.Tensor:
    with torch.inference_mode():
        return torch.ones(3) * 2


values(
    "flags of tensors",
    {
        "parameter": lambda: torch.nn.Parameter(rand(3, 2)),
        "parameter-frozen": _frozen_parameter,
        "parameter-with-grad": _with_grad,
        "requires-grad": lambda: rand(3).requires_grad_(),
        "non-leaf": lambda: rand(3).requires_grad_() * 2,
        "non-leaf-view": lambda: rand(3, 3).requires_grad_()[1],
        "inference-tensor": _in_inference_mode,
        "buffer": lambda: torch.nn.Buffer(rand(3)),
        "python-attributes": _with_attributes,
        "backward-hook": _with_hook,
        "parameter-transposed": lambda: torch.nn.Parameter(rand(3, 2).t()),
    },
)


@state("every-kind-of-tensor", "shapes and strides")
def _everything() -> dict[str, Any]:
    from tests.states import everything

    return everything()


@state("many-small-tensors", "shapes and strides")
def _many() -> dict[str, Any]:
    return {f"layer{i}.weight": torch.full((3,), float(i)) for i in range(300)}


@state("large-and-small", "shapes and strides")
def _large() -> dict[str, Any]:
    return {"large": rand(700, 700), "small": rand(1), "column": rand(700, 700)[:, 5], "flipped": rand(600, 700).t()}
