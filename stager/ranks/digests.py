"""Digests of the values that should be the same on all ranks, for the ranks to compare when the structure is new.

Every tensor that is not sharded is sampled, on any device: 1,024 of its elements, or all of a small one. The samples of one
device are brought to the host together. Where values differ although their ranks should have the same (FSDP1's flat
parameters, Adam's moments of them), nearly all elements do.

    compared as        what
    a tensor           any strided tensor whose values are in memory
    another value      numbers, texts and lists of them; statistics of BatchNorm, which differ under DDP by design
    not compared       objects; sparse, nested and quantized tensors
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch

from stager.ranks.cutting import is_stored_raw
from stager.ranks.messages import LeafDigests
from stager.state.bits import bits_of
from stager.workers.memory.tensor_memory import problem_of

_SAMPLES = 1024
_GOLDEN = 0.6180339887498949  # a step of this share of the length visits every part of it, and every row and column
_COMPARED_DEPTH = 4
_COMPARED_ENTRIES = 64 << 10
_OF_A_RANK = {"running_mean", "running_var", "num_batches_tracked"}
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def digests_of(values: Mapping[str, Any]) -> LeafDigests:
    """Digest what can be compared.

    Args:
        values: by their names.
    """
    others = {
        name: _digest(repr(value).encode("utf-8", "surrogatepass"))
        for name, value in values.items()
        if not isinstance(value, torch.Tensor) and _is_simple(value)
    }
    by_device: dict[torch.device, dict[str, torch.Tensor]] = {}
    for name, value in values.items():
        if isinstance(value, torch.Tensor) and (sample := _sample(value)) is not None:
            by_device.setdefault(value.device, {})[name] = sample
    sampled = {name: digest for samples in by_device.values() for name, digest in _digests(samples).items()}
    of_a_rank = {name for name in sampled if name.rpartition(".")[2] in _OF_A_RANK}
    others |= {name: sampled[name] for name in of_a_rank}
    tensors = {name: digest for name, digest in sampled.items() if name not in of_a_rank}
    return LeafDigests(0, dict(sorted(tensors.items())), dict(sorted(others.items())))


def _sample(tensor: torch.Tensor) -> torch.Tensor | None:
    """Some elements of a tensor, as bytes on its device; None if it cannot be compared."""
    if (
        tensor.is_nested
        or 0 in tensor.shape
        or hasattr(tensor, "global_shape")
        or hasattr(tensor, "__tensor_flatten__")
    ):
        return None  # a sharded tensor among the plain ones has no elements
    if not is_stored_raw(tensor) or tensor.is_meta or problem_of(tensor) is not None:
        return None
    whole = tensor.detach().resolve_conj().resolve_neg()
    whole = torch.view_as_real(whole) if whole.is_complex() else whole
    whole = whole.view(_INTEGERS[whole.itemsize])  # torch does not take elements of every dtype
    count = whole.numel()
    if count > 2 * _SAMPLES:
        places = torch.arange(_SAMPLES, device=whole.device).mul_(_step(count)).remainder_(count)
        whole = torch.take(whole, places)
    return bits_of(whole)


@lru_cache(maxsize=4096)
def _step(count: int) -> int:
    """The distance between two samples of ``count`` elements: it has no divisor in common with any number of columns."""
    step = int(count * _GOLDEN)
    while math.gcd(step, count) > 1:
        step += 1
    return step


def _digests(samples: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Digest the samples of one device."""
    data = torch.cat(list(samples.values())).cpu().numpy().tobytes()
    digests, end = {}, 0
    for name, sample in samples.items():
        start, end = end, end + len(sample)
        digests[name] = _digest(data[start:end])
    return digests


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _is_simple(value: Any, depth: int = 0) -> bool:
    if type(value) not in (list, tuple):
        return type(value) in (type(None), bool, int, float, complex, str, bytes)
    entries: Sequence[Any] = value
    return (
        depth < _COMPARED_DEPTH and len(entries) <= _COMPARED_ENTRIES and all(_is_simple(e, depth + 1) for e in entries)
    )
