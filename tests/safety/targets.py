"""Run directories that are spoiled and opened again and again: whole ones, crashed ones, stock DCP's."""

from __future__ import annotations

import json
import pickle
import pickletools
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import xxhash

from stager.workers.checkpoint.commit.commit import partial_path
from stager.workers.checkpoint.commit.persist import persist_part
from stager.workers.checkpoint.directory.manifest_file import read_manifest
from stager.workers.checkpoint.documents.envelope import seal
from tests.persistence.tasks import Crash, make_task, run, save
from tests.safety.mutate import mutate_archive, mutate_bytes, mutate_file, mutate_json, mutate_pickle, sealed

STATE: dict[str, Any] = {
    "model": torch.nn.Linear(3, 2).state_dict(),
    "a": torch.arange(6.0).reshape(2, 3),
    "b": [torch.tensor(1), {"c": torch.empty(0, 3), 3: torch.ones(4, dtype=torch.bfloat16)}],
    "rest": {"o": {"lr": 0.1, "betas": (0.9, 0.99)}, "sparse": torch.eye(3).to_sparse()},
}
STEP = 2
FILE_NAME = "saved.pt"


@dataclass(frozen=True)
class Target:
    """Attributes:
    base: what is copied for each try; holds the run's directory, a canary, and nothing else.
    spoil: change a copy, given (random source, the copy, the mark that hostile pickles leave).
    """

    base: Path
    spoil: Callable[[random.Random, Path, Path], None]


def make_targets(directory: Path) -> dict[str, Target]:
    makers = {
        "manifest": (_whole, _spoil_manifest),
        "chunks": (_chunks, _spoil_manifest),
        "data": (_whole, _spoil_data),
        "manifest, torch": (_whole_torch, _spoil_manifest),
        "data, torch": (_whole_torch, _spoil_data),
        "manifest, safetensors": (_whole_safetensors, _spoil_manifest),
        "data, safetensors": (_whole_safetensors, _spoil_data),
        "files": (_whole, _spoil_files),
        "record": (_receipts, _spoil_record),
        "receipts": (_receipts, _spoil_receipts),
        "unnamed": (_unnamed, _spoil_partial_manifest),
        "stock": (_stock, _spoil_stock),
        "torch.save": (_torch_save, _spoil_file),
        "torch.save, no archive": (_torch_save_legacy, _spoil_legacy),
        "state.pt": (_state_pt, _spoil_file),
        "state.safetensors": (_state_safetensors, _spoil_safetensors),
    }
    targets = {}
    for name, (make, spoil) in makers.items():
        base = directory / name
        (base / "run").mkdir(parents=True)
        (base / "canary").write_text("precious")
        make(base / "run")
        targets[name] = Target(base, spoil)
    return targets


def _whole(run_dir: Path, kind: str = "dcp") -> None:
    save(run_dir, {"a": torch.zeros(2)}, step=1, kind=kind, fsync=False)
    save(run_dir, STATE, step=STEP, kind=kind, num_files=2, segment_bytes=1000, fsync=False)


def _whole_torch(run_dir: Path) -> None:
    _whole(run_dir, "torch")


def _whole_safetensors(run_dir: Path) -> None:
    _whole(run_dir, "safetensors")


def _torch_save(run_dir: Path) -> None:
    torch.save(STATE, run_dir / FILE_NAME)


def _torch_save_legacy(run_dir: Path) -> None:
    torch.save(STATE, run_dir / FILE_NAME, _use_new_zipfile_serialization=False)


def _state_pt(run_dir: Path) -> None:
    """stager's own file, taken for itself."""
    info = save(run_dir, STATE, kind="torch", fsync=False)
    (Path(info.path) / "state.pt").rename(run_dir / FILE_NAME)
    shutil.rmtree(info.path)


def _chunks(run_dir: Path) -> None:
    """Two tensors as two halves of one."""
    whole = save(run_dir, {"x": torch.ones(2, 3), "y": torch.zeros(2, 3)}, step=STEP, fsync=False)
    path = Path(whole.path) / "manifest.json"
    body = json.loads(path.read_bytes())["body"]
    body["structure"] = ["dict", ["z"], [["chunks", [4, 3], [[[0, 0], 0], [[2, 0], 1]]]]]
    path.write_bytes(seal(body))
    read_manifest(whole.path)


def _receipts(run_dir: Path) -> None:
    """Every part written, nothing committed."""
    job = make_task(run_dir, STATE, step=STEP, segment_bytes=1000, fsync=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stager.workers.checkpoint.commit.persist.try_commit", lambda *_: None)
        for part in range(job.spec.num_parts):
            persist_part(job, part)


def _unnamed(run_dir: Path) -> None:
    """The manifest written, the name not given; an older checkpoint of the step is there."""

    def crash(*_: object) -> None:
        raise Crash

    save(run_dir, {"a": torch.zeros(2)}, step=STEP, fsync=False)
    job = make_task(run_dir, STATE, step=STEP, fsync=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stager.workers.checkpoint.storage.posix.file_system.rename_over", crash)
        with pytest.raises(Crash):
            run(job)
    assert Path(partial_path(job.spec)).is_dir()


def _stock(run_dir: Path) -> None:
    dcp.save(_for_dcp(), storage_writer=dcp.FileSystemWriter(run_dir / "stock"), no_dist=True)


def _for_dcp() -> dict[str, Any]:
    state = {key: STATE[key] for key in ("model", "a", "b")}
    return {**state, "o": STATE["rest"]["o"]}


def checkpoint(run_dir: Path) -> Path:
    return run_dir / f"step-{STEP:08d}"


def _partial(run_dir: Path) -> Path:
    return next(run_dir.glob("*.partial-*"))


def _rewrite(rng: random.Random, path: Path, times: int = 1) -> None:
    """Mutate a sealed document and seal it again."""
    body = json.loads(path.read_bytes())["body"]
    for _ in range(times):
        body = mutate_json(rng, body)
    path.write_bytes(sealed(rng, body))


def _times(rng: random.Random) -> int:
    return rng.choice((1, 1, 1, 2, 3, 6))


def _spoil_manifest(rng: random.Random, run_dir: Path, mark: Path) -> None:
    path = checkpoint(run_dir) / "manifest.json"
    if rng.random() < 0.1:
        path.write_bytes(mutate_bytes(rng, path.read_bytes()))
    else:
        _rewrite(rng, path, _times(rng))


def _spoil_partial_manifest(rng: random.Random, run_dir: Path, mark: Path) -> None:
    _rewrite(rng, _partial(run_dir) / "manifest.json", _times(rng))


def _spoil_record(rng: random.Random, run_dir: Path, mark: Path) -> None:
    _rewrite(rng, _partial(run_dir) / "save-0.json", _times(rng))


def _spoil_receipts(rng: random.Random, run_dir: Path, mark: Path) -> None:
    partial = _partial(run_dir)
    if rng.random() < 0.3:
        mutate_file(rng, rng.choice(sorted(partial.iterdir())), run_dir.parent / "canary")
    else:
        _rewrite(rng, partial / f"receipt-0-{rng.randrange(2)}-of-2.json", _times(rng))


def _spoil_files(rng: random.Random, run_dir: Path, mark: Path) -> None:
    path = checkpoint(run_dir)
    victim = rng.choice([*sorted(path.iterdir()), path, *sorted(run_dir.iterdir())])
    mutate_file(rng, victim, rng.choice((run_dir.parent / "canary", run_dir, Path("/etc"))))


def _spoil_data(rng: random.Random, run_dir: Path, mark: Path) -> None:
    """An item's bytes are others, of another length perhaps, and the manifest says that this is as it should be."""
    path = checkpoint(run_dir)
    body = json.loads((path / "manifest.json").read_bytes())["body"]
    rows = body["rows"]
    objects = [number for number, row in enumerate(rows) if row[0] == "object"]
    number = rng.choice(objects) if rng.random() < 0.8 else rng.randrange(len(rows))
    row = rows[number]
    name = body["files"][row[1]][0]
    content = (path / name).read_bytes()
    blob = content[row[2] : row[2] + row[3]]
    changed = mutate_archive(rng, blob, mark) if row[0] == "object" else mutate_bytes(rng, blob)
    if row[0] == "tensor":
        changed = changed[: len(blob)].ljust(len(blob), b"\0")
    span_end = rows[number + 1][2] if number + 1 < len(rows) and rows[number + 1][1] == row[1] else len(content)
    padded = changed.ljust(-(-max(1, len(changed)) // 64) * 64, b"\0") if row[0] == "object" else changed
    tail = content[span_end:] if row[0] == "object" else content[row[2] + row[3] :]
    content = content[: row[2]] + padded + tail
    shift = len(content) - body["files"][row[1]][1]
    row[3], row[5] = len(changed), len(changed) if row[0] == "object" else row[5]
    for later in rows[number + 1 :]:
        if later[1] == row[1]:
            later[2] += shift
            later[4] += shift
    body["files"][row[1]][1] = len(content)
    (path / name).write_bytes(content)
    step = body["segment_bytes"]
    for index, one in enumerate(rows):
        if one[1] == row[1]:
            end = rows[index + 1][2] if index + 1 < len(rows) and rows[index + 1][1] == one[1] else len(content)
            span = content[one[2] : end]
            one[9] = [xxhash.xxh3_128_hexdigest(span[at : at + step]) for at in range(0, max(1, len(span)), step)]
    (path / "manifest.json").write_bytes(seal(body))


def _state_safetensors(run_dir: Path) -> None:
    info = save(run_dir, STATE, kind="safetensors", num_parts=1, fsync=False)
    (Path(info.path) / "state.safetensors").rename(run_dir / FILE_NAME)
    shutil.rmtree(info.path)


def _spoil_safetensors(rng: random.Random, run_dir: Path, mark: Path) -> None:
    path = run_dir / FILE_NAME
    data, kind = path.read_bytes(), rng.random()
    if kind < 0.1:
        mutate_file(rng, path, run_dir.parent / "canary")
    elif kind < 0.3:
        path.write_bytes(mutate_bytes(rng, data))
    else:  # the header is another one, and as long as the file says
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        for _ in range(_times(rng)):
            header = mutate_json(rng, header)
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def _spoil_file(rng: random.Random, run_dir: Path, mark: Path) -> None:
    path = run_dir / FILE_NAME
    if rng.random() < 0.1:
        mutate_file(rng, path, run_dir.parent / "canary")
    else:
        path.write_bytes(mutate_archive(rng, path.read_bytes(), mark))


def _spoil_legacy(rng: random.Random, run_dir: Path, mark: Path) -> None:
    """One of the five pickles is another one, or bytes anywhere are others."""
    path = run_dir / FILE_NAME
    data, kind = path.read_bytes(), rng.random()
    if kind < 0.1:
        mutate_file(rng, path, run_dir.parent / "canary")
    elif kind < 0.3:
        path.write_bytes(mutate_bytes(rng, data))
    else:
        ends = [0]
        for _ in range(5):
            *_, (_, _, stop) = pickletools.genops(data[ends[-1] :])
            ends.append(ends[-1] + stop + 1)
        number = rng.choice((0, 1, 2, 3, 3, 3, 3, 3, 4))
        start, end = ends[number], ends[number + 1]
        path.write_bytes(data[:start] + mutate_pickle(rng, data[start:end], mark) + data[end:])


def _spoil_stock(rng: random.Random, run_dir: Path, mark: Path) -> None:
    path = run_dir / "stock"
    kind = rng.random()
    index = path / ".metadata"
    if kind < 0.25:
        index.write_bytes(mutate_pickle(rng, index.read_bytes(), mark))
    elif kind < 0.65:
        metadata = pickle.loads(index.read_bytes())
        for _ in range(_times(rng)):
            _spoil_attribute(rng, metadata)
        try:
            index.write_bytes(pickle.dumps(metadata))
        except RecursionError:  # nobody can write this
            index.unlink()
    elif kind < 0.8:
        mutate_file(rng, rng.choice(sorted(path.iterdir())), run_dir.parent / "canary")
    else:
        _spoil_stock_data(rng, path, mark)


def _spoil_attribute(rng: random.Random, metadata: Any) -> None:
    """One attribute somewhere in the tree of dataclasses is something else."""
    from tests.safety.mutate import hostile_value

    groups = [
        [metadata],
        list(metadata.storage_data.values()) if isinstance(metadata.storage_data, dict) else [metadata],
        list(metadata.state_dict_metadata.values()) if isinstance(metadata.state_dict_metadata, dict) else [metadata],
    ]
    owner = rng.choice([one for one in rng.choice(groups) if hasattr(one, "__dict__")] or [metadata])
    chunks = getattr(owner, "chunks", None)
    if isinstance(chunks, list) and chunks and rng.random() < 0.5:
        owner = chunks[0]
    names = sorted(vars(owner)) if hasattr(owner, "__dict__") else []
    if not names:
        return
    name, value = rng.choice(names), hostile_value(rng)
    current = getattr(owner, name)
    if isinstance(current, torch.Size) and rng.random() < 0.7:
        numbers = list(current) or [1]
        numbers[rng.randrange(len(numbers))] = rng.choice((0, 1, 1 << 20, 1 << 40, (1 << 62) + 1, -1))
        value = torch.Size(numbers)
    elif isinstance(current, dict) and current and rng.random() < 0.7:
        current[rng.choice(list(current))] = rng.choice((value, ("a", 1 << 40), (), ("..",)))
        return
    elif type(current) is int and rng.random() < 0.7:
        value = rng.choice((0, -1, current + 1, 1 << 40, (1 << 63) - 1))
    vars(owner)[name] = value


def _spoil_stock_data(rng: random.Random, path: Path, mark: Path) -> None:
    index = path / ".metadata"
    metadata = pickle.loads(index.read_bytes())
    info = rng.choice(list(metadata.storage_data.values()))
    file = path / info.relative_path
    content = file.read_bytes()
    changed = mutate_archive(rng, content[info.offset : info.offset + info.length], mark)
    info.offset, info.length = len(content), len(changed)
    file.write_bytes(content + changed)
    index.write_bytes(pickle.dumps(metadata))
