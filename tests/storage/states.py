"""States for ``dcp.save`` and ``dcp.load``: what of ``tests.states.everything`` they keep, and targets to load into."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from stager.torch_api.storage import StagerStorageReader, StagerStorageWriter
from tests.states import everything

WRITERS: dict[str, Any] = {"stock": dcp.FileSystemWriter, "ours": StagerStorageWriter}
READERS: dict[str, Any] = {"stock": dcp.FileSystemReader, "ours": StagerStorageReader}

NOT_STOCKS = ("sparse", "quantized")  # its writer asks such tensors for their storage


def state_for_dcp(seed: int = 0) -> dict[str, Any]:
    """DCP makes strings of keys, and so puts an object under an int key into another place."""
    state = everything(seed)
    del state["ints"][7]["flag"]
    return state


def blank(value: Any) -> Any:
    """The same with every tensor and object overwritten; tensors are dense, for what is expanded cannot be loaded into."""
    if isinstance(value, torch.Tensor):
        if value.layout is not torch.strided or value.is_quantized:
            return "something else"
        other = torch.empty_like(value.resolve_conj().resolve_neg(), memory_format=torch.contiguous_format)
        other.view(torch.uint8).fill_(1) if other.dim() and other.numel() else other.zero_()
        return other
    if isinstance(value, Mapping):
        return type(value)((key, blank(child)) for key, child in value.items())
    if isinstance(value, list):
        return [blank(child) for child in value]
    return "something else"


def save(state: dict[str, Any], writer: Any) -> None:
    dcp.save(state, storage_writer=writer)


def load(state: dict[str, Any], reader: Any) -> dict[str, Any]:
    """``state`` with the checkpoint's values."""
    dcp.load(state, storage_reader=reader)
    return state


def failure(error: dcp.api.CheckpointException) -> BaseException:
    """What went wrong on rank 0."""
    return error.failures[0][0]
