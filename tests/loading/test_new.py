"""Loading into new memory, and out of checkpoints that are hostile."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

from stager import StagerError, UnloadableError, UnsafePickleError, UsageError
from stager.loading.pickles.unpickle import unpickle
from stager.workers.checkpoint.directory.run_directory import CheckpointInfo, read_checkpoint
from stager.workers.checkpoint.documents.envelope import seal, unseal
from stager.workers.checkpoint.formats.object_pickle import pickle_object
from stager.workers.checkpoint.formats.torch_settings import torch_defaults
from tests.persistence.tasks import load, restorer, save
from tests.states import everything, same


def test_default_device_dtype_and_determinism_do_not_matter(run_dir: Path) -> None:
    """A user who builds models on the meta device loads checkpoints all the same."""
    state = everything()
    info = save(run_dir, state)
    torch.use_deterministic_algorithms(True)
    torch.set_default_device("meta")
    try:
        loaded = load(info)
    finally:
        torch.set_default_device("cpu")
        torch.use_deterministic_algorithms(False)
    assert same(loaded, state)


def test_meta_tensor_comes_back_without_memory(run_dir: Path) -> None:
    loaded = load(save(run_dir, {"m": torch.empty(3, 1 << 40, device="meta"), "x": torch.ones(1)}))
    assert loaded["m"].is_meta and loaded["m"].shape == (3, 1 << 40)


def test_loaded_tensors_are_ordinary(run_dir: Path) -> None:
    loaded = load(save(run_dir, {"x": torch.randn(5), "t": torch.randn(2, 3).t()}))
    assert not loaded["x"].requires_grad and loaded["x"].is_leaf
    assert loaded["t"].stride() == (1, 3)
    loaded["x"].requires_grad_().sum().backward()
    loaded["x"].data.resize_(100)
    assert loaded["x"].untyped_storage().nbytes() == 400


@pytest.mark.parametrize("num_threads", [1, 3])
def test_any_number_of_threads(run_dir: Path, num_threads: int) -> None:
    state = {f"t{i}": torch.randn(200_000 if i % 50 == 0 else 30) for i in range(300)}
    info = save(run_dir, state, num_parts=3, num_files=3, segment_bytes=100_000)
    assert same(restorer(info, num_threads=num_threads).load(), state)


class Unsafe:
    pass


def test_objects_need_permission(run_dir: Path) -> None:
    info = save(run_dir, {"deep": [{"u": Unsafe()}, torch.ones(1)], "n": 1})
    with pytest.raises(UnsafePickleError, match=r"^deep\[0\]\['u'\] in .*Unsafe|^deep\[0\]\['u'\] in "):
        load(info)
    assert isinstance(restorer(info, allow_pickle=True).load()["deep"][0]["u"], Unsafe)
    with torch.serialization.safe_globals([Unsafe]):
        assert isinstance(load(info)["deep"][0]["u"], Unsafe)


def test_class_that_is_gone_is_the_users_to_find(run_dir: Path) -> None:
    gone = type("Gone", (), {"__module__": __name__})
    globals()["Gone"] = gone
    try:
        info = save(run_dir, {"x": gone()})
    finally:
        del globals()["Gone"]
    with pytest.raises(UsageError, match=r"intact, but the object cannot be made here .*Gone"):
        restorer(info, allow_pickle=True).load()


def test_warning_made_an_error_is_not_taken_for_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    def torch_load(*_: object, **__: object) -> None:
        raise UserWarning("something")

    monkeypatch.setattr(torch.serialization, "_load", torch_load)
    with pytest.raises(UserWarning):
        unpickle(pickle_object(1j, 0).blob, "n", "p", False)


class RunsCode:
    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("code of the checkpoint was run",)


def archive(name: str, data: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        file.writestr(name, data)
    return buffer.getvalue()


def legacy(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


BLOBS = {
    "empty": b"",
    "zeros": bytes(500),
    "text": b"PK\x03\x04 and nothing more",
    "half": pickle_object({"a": 1}, 0).blob[:200],
    "pickle": pickle.dumps({"a": 1}),
    "legacy format": legacy({"a": torch.ones(2)}),
    "no records": archive("other", b"x"),
    "no pickle": archive("archive/data.pkl", b"\xff\xfe"),
    "empty pickle": archive("archive/data.pkl", b""),
    "code": pickle_object(RunsCode(), 0).blob,
    "code in a bare pickle": archive("archive/data.pkl", pickle.dumps(RunsCode(), protocol=2)),
    "much memory": archive("archive/data.pkl", b"cbuiltins\nbytearray\n(L99999999999999999L\ntR."),
    "deep": archive("archive/data.pkl", b"(" * 10_000 + b"l" * 10_000 + b"."),
    "bomb": archive("archive/data.pkl", bytes(10 << 20), zipfile.ZIP_DEFLATED),
    "torchscript": archive("archive/constants.pkl", b"x"),
}


@pytest.mark.parametrize("name", BLOBS)
def test_hostile_objects_are_refused_and_run_no_code(name: str) -> None:
    with pytest.raises((UnloadableError, UnsafePickleError), match="thing"):
        unpickle(BLOBS[name], "thing", "path", False)


def test_archive_that_lies_about_a_size_is_refused() -> None:
    blob = bytearray(pickle_object({"a": 1}, 0).blob)
    central = blob.index(b"PK\x01\x02")
    struct.pack_into("<I", blob, central + 24, 1 << 31)
    with pytest.raises(UnsafePickleError):
        unpickle(bytes(blob), "thing", "path", False)


def plant(info: CheckpointInfo, index: int, blob: bytes) -> None:
    """Replace an object by ``blob``, with hashes, sizes and seal as they should be."""
    directory = Path(info.path)
    body = unseal((directory / "manifest.json").read_bytes(), "")
    row = body["rows"][index]
    row[3] = row[5] = len(blob)
    row[9] = [xxhash.xxh3_128_hexdigest(blob)]
    name = body["files"][row[1]][0]
    body["files"][row[1]][1] = len(blob)
    (directory / name).write_bytes(blob)
    (directory / "manifest.json").write_bytes(seal(body))


@pytest.mark.parametrize("name", BLOBS)
def test_hostile_object_in_a_checkpoint_that_is_sealed_as_it_should_be(run_dir: Path, name: str) -> None:
    info = save(run_dir, {"x": torch.ones(2), "n": 1}, num_parts=1)
    plant(info, 1, BLOBS[name])
    target = torch.zeros(2)
    with pytest.raises(StagerError):
        restorer(info).load_into({"x": target, "n": 0}, True)
    assert torch.equal(target, torch.zeros(2))


@pytest.mark.parametrize("allow_pickle", [True, False])
def test_tensor_of_a_hostile_manifest_is_raw_bytes_only(run_dir: Path, allow_pickle: bool) -> None:
    """The frame around a tensor, which is a pickle to torch.load, is never unpickled by stager."""
    info = save(run_dir, {"x": torch.ones(2)}, num_parts=1)
    path = Path(info.path, "__0_0.distcp")
    _, manifest = read_checkpoint(str(run_dir), 1)
    item = manifest.layout.items[0]
    data = bytearray(path.read_bytes())
    data[: item.data_offset] = (pickle.dumps(RunsCode()) + bytes(2000))[: item.data_offset]
    path.write_bytes(data)
    body = json.loads(Path(info.path, "manifest.json").read_bytes())["body"]
    body["rows"][0][9] = [xxhash.xxh3_128_hexdigest(bytes(data))]
    Path(info.path, "manifest.json").write_bytes(seal(body))
    assert torch.equal(restorer(info, allow_pickle=allow_pickle).load()["x"], torch.ones(2))


def test_calls_of_torch_go_through_python_only_where_tensors_would_be_made_elsewhere() -> None:
    count = torch._C._len_torch_function_stack
    before = count()
    with torch_defaults():
        assert count() == before
    with torch.device("meta"), torch_defaults():
        assert torch.empty(1).device.type == "cpu"
