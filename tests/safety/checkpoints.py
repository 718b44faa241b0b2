"""Small checkpoints drawn at random: states, dtypes, objects, files, parts, segments, in every format there is."""

from __future__ import annotations

import json
import random
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from stager.workers.checkpoint.directory.run_directory import CheckpointInfo
from stager.workers.checkpoint.documents.envelope import seal
from stager.workers.checkpoint.documents.manifest import MANIFEST_NAME
from stager.workers.checkpoint.formats import FORMATS
from tests.persistence.tasks import save
from tests.states import DTYPES, random_tensor

_OBJECTS: list[Any] = [None, True, 7, -1.5, "text", "grüße", b"\0\xff", (1, "two"), {}, [], {"a": [1, 2]}, 2**70]
_LENGTHS = (0, 1, 2, 3, 5)
_HALVES = ("first half", "second half")


def draw_state(rng: random.Random) -> dict[str, Any]:
    """A nested state of one to five leaves; tensors of a few bytes, of any dtype and stride; ties."""
    generator = torch.Generator().manual_seed(rng.randrange(1 << 40))
    leaves: list[Any] = []
    for _ in range(rng.randint(1, 5)):
        if rng.random() < 0.3:
            leaves.append(rng.choice(_OBJECTS))
        elif tensors := [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and rng.random() < 0.15]:
            leaves.append(tensors[0])  # tied
        else:
            leaves.append(_draw_tensor(rng, generator))
    state: dict[str, Any] = {}
    for number, leaf in enumerate(leaves):
        _place(rng, state, f"k{number}", leaf)
    return state


def _draw_tensor(rng: random.Random, generator: torch.Generator) -> torch.Tensor:
    shape = tuple(rng.choice(_LENGTHS) for _ in range(rng.randint(0, 3)))
    tensor = random_tensor(rng.choice(DTYPES), shape, generator)
    return tensor.t() if tensor.dim() == 2 and rng.random() < 0.3 else tensor


def _place(rng: random.Random, state: dict[str, Any], key: str, leaf: Any) -> None:
    container = rng.choice(("plain", "plain", "dict", "list", "ordered", "int key"))
    if container == "dict":
        state.setdefault("d", {})[key] = leaf
    elif container == "list":
        state.setdefault("l", []).append(leaf)
    elif container == "ordered":
        state.setdefault("o", OrderedDict())[key] = leaf
    elif container == "int key":
        state.setdefault("i", {})[len(state)] = leaf
    else:
        state[key] = leaf


def draw_checkpoint(rng: random.Random, run_dir: Path, step: int = 1) -> tuple[CheckpointInfo, dict[str, Any]]:
    """A committed checkpoint of a few KiB, and the state that is in it."""
    state = draw_state(rng)
    halves = _draw_halves(rng) if rng.random() < 0.3 else ()
    info = save(
        run_dir,
        {**state, **dict(zip(_HALVES, halves, strict=False))},
        step=step,
        kind=rng.choice(sorted(FORMATS)),
        num_parts=rng.randint(1, 3),
        num_files=rng.randint(1, 3),
        segment_bytes=rng.choice((64, 500, 64 << 20)),
        fsync=False,
    )
    if halves:
        put_together(info.path)
        state["whole"] = torch.cat(halves)
    return info, state


def _draw_halves(rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rng.randrange(1 << 40))
    dtype = rng.choice((torch.float32, torch.int16, torch.float64))
    first, second = (random_tensor(dtype, (rng.randint(1, 3), 2), generator) for _ in range(2))
    return first, second


def put_together(path: str) -> None:
    """Make one tensor in two chunks, ``whole``, of two of a checkpoint (``_HALVES``): as if two ranks had written them."""
    manifest = Path(path) / MANIFEST_NAME
    body = json.loads(manifest.read_bytes())["body"]
    leaves = dict(zip(*body["structure"][1:], strict=True))
    numbers = [leaves.pop(name) for name in _HALVES]
    shapes = [body["rows"][number][7] for number in numbers]
    length = sum(shape[0] for shape in shapes)
    parts = [[[0, 0], numbers[0]], [[shapes[0][0], 0], numbers[1]]]
    leaves["whole"] = ["chunks", [length, *shapes[0][1:]], parts]
    body["structure"] = ["dict", list(leaves), list(leaves.values())]
    manifest.write_bytes(seal(body))
