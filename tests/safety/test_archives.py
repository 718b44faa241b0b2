"""Archives of ``torch.save`` and stock ``.metadata`` that say one thing and mean another; and real ones, which pass."""

from __future__ import annotations

import dataclasses
import io
import os
import pickle
import random
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from stager import CorruptCheckpointError, UsageError, load_checkpoint
from stager.loading.pickles.archive_check import check_archive
from tests.persistence.tasks import save
from tests.safety.mutate import lengthen_storages
from tests.states import everything, same

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

HARMLESS = pickle.dumps({"a": 1}, protocol=2)
OTHER = pickle.dumps({"a": 2}, protocol=2)


def archive_of(**records: bytes) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, data in {"data.pkl": HARMLESS, "version": b"3\n", **records}.items():
            archive.writestr(f"archive/{name}", data)
    return packed.getvalue()


def check(blob: bytes) -> None:
    check_archive(io.BytesIO(blob), len(blob), "o", "somewhere")


def test_archive_in_which_torch_finds_another_pickle_is_refused() -> None:
    check(archive_of())
    twins = archive_of(**{"DATA.PKL": OTHER})
    assert torch.load(io.BytesIO(twins), weights_only=True) in ({"a": 1}, {"a": 2})  # it is not for us to say which
    with pytest.raises(CorruptCheckpointError, match="two records whose names differ in case at most"):
        check(twins)
    behind = archive_of(**{"data.pkl": OTHER}) + archive_of()
    with zipfile.ZipFile(io.BytesIO(behind)) as archive:  # Python takes the second one
        assert archive.read("archive/data.pkl") == HARMLESS
    with pytest.raises(CorruptCheckpointError, match="its directory in another place"):
        check(behind)
    inner = archive_of()
    comment = archive_of()[:-2] + struct.pack("<H", len(inner)) + inner
    with pytest.raises(CorruptCheckpointError):
        check(comment)
    with pytest.raises(CorruptCheckpointError, match="begin as a zip archive"):
        check(b"\0" * 64 + archive_of())


def test_archive_of_more_than_4_gib_has_its_directory_where_the_long_end_says(tmp_path: Path) -> None:
    """A file with a hole in it, as long as it says."""
    path = tmp_path / "large.pt"
    with zipfile.ZipFile(path, "w", allowZip64=True) as archive:
        archive.writestr("archive/data.pkl", HARMLESS)
        archive.writestr("archive/data/0", b"")
        archive.fp.seek((4 << 30) + 17, os.SEEK_CUR)
        archive.start_dir = archive.fp.tell()
        archive.writestr("archive/version", b"3\n")
    nbytes = path.stat().st_size
    assert nbytes > 4 << 30
    with open(path, "rb") as file:
        check_archive(file, nbytes, "large.pt", str(path))
    with open(path, "r+b") as file:  # the locator leads elsewhere
        file.seek(nbytes - 22 - 20 + 8)
        file.write(struct.pack("<Q", 64))
    with open(path, "rb") as file, pytest.raises(CorruptCheckpointError):
        check_archive(file, nbytes, "large.pt", str(path))


@pytest.mark.parametrize("protocol", [2, 4])
def test_storage_that_is_said_to_be_longer_than_it_is_is_refused(protocol: int) -> None:
    """Whoever believes it reads on behind the bytes that are there."""
    stored = io.BytesIO()
    torch.save({"a": torch.arange(4.0)}, stored, pickle_protocol=protocol)
    with zipfile.ZipFile(stored) as archive:
        records = {name.removeprefix("archive/"): archive.read(name) for name in archive.namelist()}
    check(archive_of(**records))
    for count in (5, 1 << 20):
        changed = records["data.pkl"].replace(b"K\x04t", b"J" + struct.pack("<i", count) + b"t", 1)
        assert changed != records["data.pkl"]
        with pytest.raises(
            CorruptCheckpointError, match=f"storage 0 has {4 * count} bytes, and the file has 16 for it"
        ):
            check(archive_of(**{**records, "data.pkl": changed}))
    with pytest.raises(CorruptCheckpointError):
        check(archive_of(**{**records, "data.pkl": records["data.pkl"].replace(b"FloatStorage", b"StormStorage")}))


def test_real_storages_of_every_dtype_pass() -> None:
    for protocol in (2, 4):
        for value in everything()["dtypes"].values():
            stored = io.BytesIO()
            torch.save([value, value[1:], value.clone().untyped_storage()], stored, pickle_protocol=protocol)
            check(stored.getvalue())
    many = io.BytesIO()
    torch.save({str(n): torch.zeros(1) for n in range(300)}, many)
    check(many.getvalue())
    with zipfile.ZipFile(many) as archive:
        data = archive.read("archive/data.pkl")
    assert lengthen_storages(random.Random(1), data) != data  # what the fuzzer makes of it


def stock(path: Path, **state: Any) -> Any:
    dcp.save(state, checkpoint_id=path, no_dist=True)
    return pickle.loads((path / ".metadata").read_bytes())


def refused(path: Path, metadata: Any, match: str, error: type[Exception] = CorruptCheckpointError) -> None:
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(error, match=match):
        load_checkpoint(path)


def test_stock_tensor_of_millions_of_elements_is_read(tmp_path: Path) -> None:
    """Its size is a number larger than the whole ``.metadata``: that alone is no sin."""
    state = {"flat": torch.arange(3_000_000, dtype=torch.int8), "rows": torch.ones(2, 3)}
    stock(tmp_path / "stock", **state)
    assert same(load_checkpoint(tmp_path / "stock").state, state)


def test_lists_of_a_stock_checkpoint_cannot_be_longer_than_their_names_explain(tmp_path: Path) -> None:
    """Each is as long as the last place in it that has a name; n lists of n places are no work to write."""
    path = tmp_path / "stock"
    metadata = stock(path, w=torch.ones(4))
    index = next(iter(metadata.storage_data))
    for number in range(300):
        name = f"l{number}.299"
        metadata.planner_data[name] = (f"l{number}", 299)
        metadata.state_dict_metadata[name] = metadata.state_dict_metadata["w"]
        metadata.storage_data[dataclasses.replace(index, fqn=name)] = metadata.storage_data[index]
    refused(path, metadata, "more positions than there are names|larger than its files")
    metadata.planner_data = {"w": ("w", *range(1000))}
    refused(path, metadata, "not a key path")


def test_chunks_of_a_stock_checkpoint_have_to_fill_the_tensor(tmp_path: Path) -> None:
    """The same chunk a million times would be a tensor of a million times the memory."""
    path = tmp_path / "stock"
    metadata = stock(path, w=torch.ones(4, 2))
    tensor = metadata.state_dict_metadata["w"]
    metadata.state_dict_metadata["w"] = dataclasses.replace(tensor, chunks=tensor.chunks * 3, size=torch.Size([12, 2]))
    refused(path, metadata, "overlap")
    metadata.state_dict_metadata["w"] = dataclasses.replace(tensor, size=torch.Size([3, 2]))
    refused(path, metadata, "beyond the tensor")


def test_stock_object_that_is_nowhere(tmp_path: Path) -> None:
    path = tmp_path / "stock"
    metadata = stock(path, w=torch.ones(4), n=3)
    metadata.storage_data = {index: info for index, info in metadata.storage_data.items() if index.fqn != "n"}
    refused(path, metadata, "contradicts itself")


def test_stock_checkpoint_written_through_an_extension_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "stock"
    metadata = stock(path, w=torch.ones(4))
    for info in metadata.storage_data.values():
        vars(info)["transform_descriptors"] = ["stream.zstd"]
    refused(path, metadata, "allow_pickle=True: torch then reads it", UsageError)


def test_own_checkpoint_with_tied_weights_is_read_as_stock(run_dir: Path) -> None:
    """Names that share their bytes: fewer bytes than the names add up to."""
    weight = torch.randn(50, 4)
    state = {"a": weight, "b": {"tied": weight}}
    path = Path(save(run_dir, state).path)
    (path / "manifest.json").unlink()
    assert same(load_checkpoint(path).state, state)
