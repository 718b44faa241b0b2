"""Tensors that are more than bytes and strides."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from tests.states.corpus.registry import Expect, values
from tests.states.corpus.tensors import rand


def _quiet(make: Any) -> Any:
    """Such a tensor, without the warning that its kind is a prototype or deprecated."""

    def made() -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return make()

    return made


def _uncoalesced() -> torch.Tensor:
    return torch.sparse_coo_tensor([[1, 1, 0]], [1.0, 2.0, 3.0], (4,), check_invariants=False)


def _csr_int32() -> torch.Tensor:
    dense = torch.eye(4).to_sparse_csr()
    return torch.sparse_csr_tensor(dense.crow_indices().int(), dense.col_indices().int(), dense.values(), (4, 4))


values(
    "sparse",
    {
        name: _quiet(make)
        for name, make in {
            "sparse-coo": lambda: torch.eye(3).to_sparse(),
            "sparse-coo-uncoalesced": _uncoalesced,
            "sparse-coo-hybrid": lambda: rand(4, 3, 2).to_sparse(1),
            "sparse-coo-empty": lambda: torch.zeros(4, 4).to_sparse(),
            "sparse-coo-parameter": lambda: torch.nn.Parameter(torch.eye(3).to_sparse()),
            "sparse-csr": lambda: torch.eye(4).to_sparse_csr(),
            "sparse-csr-int32": _csr_int32,
            "sparse-csc": lambda: torch.eye(4).to_sparse_csc(),
            "sparse-bsr": lambda: rand(4, 4).to_sparse_bsr((2, 2)),
            "sparse-bsc": lambda: rand(4, 4).to_sparse_bsc((2, 2)),
            "sparse-csr-batched": lambda: torch.stack([torch.eye(3), torch.eye(3) * 2]).to_sparse_csr(),
        }.items()
    },
)


def _per_channel(axis: int = 0) -> torch.Tensor:
    scales, zeros = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0, 1, 2])
    return torch.quantize_per_channel(rand(3, 3), scales, zeros, axis, torch.qint8)


values(
    "quantized",
    {
        name: _quiet(make)
        for name, make in {
            "quantized-qint8": lambda: torch.quantize_per_tensor(rand(4), 0.1, 3, torch.qint8),
            "quantized-quint8": lambda: torch.quantize_per_tensor(rand(4), 0.1, 3, torch.quint8),
            "quantized-qint32": lambda: torch.quantize_per_tensor(rand(4), 0.1, 3, torch.qint32),
            "quantized-transposed": lambda: torch.quantize_per_tensor(rand(4, 3), 0.1, 3, torch.qint8).t(),
            "quantized-per-channel": _per_channel,
            "quantized-per-channel-axis-1": lambda: _per_channel(1),
            "quantized-float-params": lambda: torch.quantize_per_channel(
                rand(3, 4), torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.0, 1.0, 2.0]), 0, torch.quint4x2
            ),
        }.items()
    },
)

values(
    "nested",
    {
        name: _quiet(make)
        for name, make in {
            "nested-strided": lambda: torch.nested.nested_tensor([rand(2, 3), rand(4, 3)]),
            "nested-jagged": lambda: torch.nested.nested_tensor([rand(2, 3), rand(4, 3)], layout=torch.jagged),
            "nested-jagged-grad": lambda: torch.nested.nested_tensor(
                [rand(2), rand(4)], layout=torch.jagged, requires_grad=True
            ),
            "nested-jagged-lengths": lambda: torch.nested.nested_tensor_from_jagged(
                rand(8, 2), torch.tensor([0, 4, 8]), lengths=torch.tensor([2, 3])
            ),
        }.items()
    },
)


values(  # torch.save writes it, and torch.load fails an assertion
    "nested",
    {"nested-strided-empty": _quiet(lambda: torch.nested.nested_tensor([]))},
    expect=Expect.UNLOADABLE,
)


def _two_of_one_raggedness() -> dict[str, torch.Tensor]:
    offsets = torch.tensor([0, 2, 5])
    return {
        "a": torch.nested.nested_tensor_from_jagged(rand(5, 2), offsets),
        "b": torch.nested.nested_tensor_from_jagged(rand(5, 3), offsets),
    }


values("nested", {"nested-jagged-same-offsets": _quiet(_two_of_one_raggedness)})

values("mkldnn", {"mkldnn": lambda: rand(3, 3).to_mkldnn()} if torch.backends.mkldnn.is_available() else {})

values(
    "named tensors",
    {
        "named": _quiet(lambda: torch.ones(2, 3, names=("N", "C"))),
        "named-in-list": _quiet(lambda: [torch.ones(2, 3, names=("N", None))]),
    }
    if hasattr(torch.Tensor, "has_names")
    else {},
    expect=Expect.REFUSED,  # torch.save refuses them
)

values(
    "meta",
    {
        "meta-tensor": lambda: torch.empty(3, device="meta"),
        "meta-parameter": lambda: torch.nn.Linear(2, 3, device="meta").weight,
        "meta-model": lambda: torch.nn.Linear(2, 3, device="meta").state_dict(),
        "meta-in-list": lambda: [torch.ones(1), torch.empty(3, device="meta")],
        "meta-in-tuple": lambda: (torch.ones(1), torch.empty(3, device="meta")),
        "meta-sparse": _quiet(lambda: torch.empty(3, 3, device="meta", layout=torch.sparse_coo)),
    },
)
