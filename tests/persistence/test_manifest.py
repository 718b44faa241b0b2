"""Manifests that lie: sealed as they should be, and impossible. Each is refused before anything is opened or allocated."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stager.workers.checkpoint.directory.manifest_file import read_manifest
from stager.workers.checkpoint.directory.run_directory import list_checkpoints
from stager.workers.checkpoint.documents.envelope import seal, seal_json
from stager.workers.checkpoint.documents.manifest import parse_manifest
from stager.workers.errors import CorruptCheckpointError
from tests.persistence.tasks import save

STATE = {"a": torch.arange(6.0).reshape(2, 3), "b": [torch.tensor(1), {"c": torch.empty(0, 3)}], "d": {"o": "object"}}
KIND, FILE, OFFSET, NBYTES, DATA_OFFSET, DATA_NBYTES, DTYPE, SHAPE, STRIDE, HASHES = range(10)


@pytest.fixture(scope="module")
def body(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of a good manifest: three tensors in two files, an object in a third."""
    info = save(tmp_path_factory.mktemp("run"), STATE, num_files=2, segment_bytes=1000)
    result: dict[str, Any] = json.loads((Path(info.path) / "manifest.json").read_bytes())["body"]
    assert len(result["files"]) == 3 and len(result["rows"]) == 4
    return result


def set_row(row: int, column: int, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda body: body["rows"][row].__setitem__(column, value)


def set_key(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda body: body.__setitem__(key, value)


def set_name(name: Any) -> Callable[[dict[str, Any]], None]:
    return lambda body: body["files"][0].__setitem__(0, name)


def both(*changes: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    def change_all(body: dict[str, Any]) -> None:
        for change in changes:
            change(body)

    return change_all


def nested(depth: int) -> Any:
    node: Any = 0
    for _ in range(depth):
        node = ["list", [node]]
    return node


def repeat_rows(body: dict[str, Any]) -> None:
    """The same file over and over: each round would take its memory again."""
    body["rows"] = body["rows"] * 50
    count = len(body["rows"])
    body["structure"] = ["dict", [*range(count)], [*range(count)]]


_TAKEN = ["manifest.json", ".metadata", "__0_1.distcp"]
_BAD_NAMES: list[Any] = ["../x", "/etc/passwd", "a/b", "..", ".", "", "a\0b", "x" * 300, "\n", None, 3, *_TAKEN]
_BAD_NUMBERS: list[Any] = [-1, True, 1.0, "0", None, [], 1 << 70, 7777]

HOSTILE: dict[str, Callable[[dict[str, Any]], None]] = {
    **{f"file name {name!r}"[:60]: set_name(name) for name in _BAD_NAMES},
    "index file elsewhere": lambda b: b["index_files"][0].__setitem__(0, "../../x"),
    "index file of negative size": lambda b: b["index_files"][0].__setitem__(1, -1),
    "file larger than its items": lambda b: b["files"][0].__setitem__(1, 1 << 50),
    "file smaller than its items": lambda b: b["files"][0].__setitem__(1, 10),
    "file of a fractional size": lambda b: b["files"][0].__setitem__(1, 832.0),
    "file without items": lambda b: b["files"].append(["extra", 0]),
    "one file too few": lambda b: b["files"].pop(),
    "rows again": repeat_rows,
    "no rows": set_key("rows", []),
    "row too short": lambda b: b["rows"][0].pop(),
    "row is text": lambda b: b["rows"].__setitem__(0, "abcdefghij"),
    "rows in another order": lambda b: b["rows"].reverse(),
    "unknown columns": lambda b: b["columns"].reverse(),
    "no columns": lambda b: b.pop("columns"),
    **{f"row 0 column {column} is {value!r}"[:60]: set_row(0, column, value)
       for column in (FILE, OFFSET, NBYTES, DATA_OFFSET, DATA_NBYTES)
       for value in _BAD_NUMBERS},
    "kind unknown": set_row(0, KIND, "module"),
    "kind is a list": set_row(0, KIND, []),
    "tensor turned object": set_row(0, KIND, "object"),
    "object turned tensor": set_row(3, KIND, "tensor"),
    "object smaller than its blob": set_row(3, DATA_NBYTES, 1),
    "dtype unknown": set_row(0, DTYPE, "float33"),
    "dtype no dtype": set_row(0, DTYPE, "nn"),
    "dtype no text": set_row(0, DTYPE, ["float32"]),
    "dtype of another size": set_row(0, DTYPE, "float64"),
    "dtype quantized": set_row(0, DTYPE, "qint32"),
    "shape too large": set_row(0, SHAPE, [2, 1 << 60]),
    "shape negative": set_row(0, SHAPE, [-2, -3]),
    "shape of bools": set_row(0, SHAPE, [True, 6]),
    "shape of other rank": set_row(0, SHAPE, [6]),
    "shape is text": set_row(0, SHAPE, "23"),
    "shape null": set_row(0, SHAPE, None),
    "huge shape with a zero": both(set_row(2, SHAPE, [1 << 62, 1 << 62, 0]), set_row(2, STRIDE, [1, 1, 1])),
    "length beyond 64 bits with a zero": both(set_row(2, SHAPE, [1 << 70, 0]), set_row(2, STRIDE, [1, 1])),
    "stride beyond 64 bits": set_row(2, STRIDE, [1 << 70, 1]),
    "stride overlapping": set_row(0, STRIDE, [0, 1]),
    "stride with holes": set_row(0, STRIDE, [30, 1]),
    "stride negative": set_row(0, STRIDE, [-3, 1]),
    "stride too short": set_row(0, STRIDE, [1]),
    "hash too many": lambda b: b["rows"][0][HASHES].append("00"),
    "hash too few": set_row(0, HASHES, []),
    "hash no text": set_row(0, HASHES, [None]),
    "segments of nothing": set_key("segment_bytes", 0),
    "segments negative": set_key("segment_bytes", -1),
    "segments of another size": set_key("segment_bytes", 1),
    "step negative": set_key("step", -1),
    "step a bool": set_key("step", True),
    "step text": set_key("step", "1"),
    "created text": set_key("created", "1e3"),
    "created null": set_key("created", None),
    "created beyond floats": set_key("created", 10**400),
    "save_id a number": set_key("save_id", 5),
    "kind a number": set_key("kind", 5),
    "structure missing": lambda b: b.pop("structure"),
    "structure not a mapping": set_key("structure", ["list", [0, 1, 2, 3]]),
    "structure a leaf": set_key("structure", 0),
    "structure unknown": set_key("structure", ["set", [0]]),
    "structure empty": set_key("structure", []),
    "structure too deep": set_key("structure", ["dict", ["x"], [nested(300)]]),
    "structure too deep for Python's reader": set_key("structure", "deep"),
    "structure names no item": set_key("structure", ["dict", ["x"], [4]]),
    "structure names a negative item": set_key("structure", ["dict", ["a", "b", "c", "d", "e"], [0, 1, 2, 3, -1]]),
    "structure leaves items out": set_key("structure", ["dict", ["a", "b"], [0, 1]]),
    "structure names with a bool": set_key("structure", ["dict", list("abcde"), [0, 1, 2, 3, True]]),
    "structure with more keys": set_key("structure", ["dict", list("abcde"), [0, 1, 2, 3]]),
    "structure with a key twice": set_key("structure", ["dict", list("abca"), [0, 1, 2, 3]]),
    "structure with equal keys": set_key("structure", ["dict", [1, True, 2, 3], [0, 1, 2, 3]]),
    "structure with a list as key": set_key("structure", ["dict", [[], "b", "c", "d"], [0, 1, 2, 3]]),
    "metadata no mapping": set_key("structure", ["odict", list("abcd"), [0, 1, 2, 3], 5]),
    "metadata no mapping of mappings": set_key("structure", ["odict", list("abcd"), [0, 1, 2, 3], {"": 1}]),
    "another document": set_key("format", "other"),
    "rows a mapping": set_key("rows", {"0": 1}),
    "a sidecar that is no file": set_key("sidecars", ["config.json"]),
}  # fmt: skip


def test_the_good_one_is_accepted(body: dict[str, Any]) -> None:
    assert parse_manifest(seal(body), "p").header.step == 1


def test_a_data_file_may_have_another_program_s_name(body: dict[str, Any]) -> None:
    """It is then named among the sidecars, so that it is removed with the checkpoint."""
    changed = copy.deepcopy(body)
    changed["files"][0][0], changed["sidecars"] = "model_0.pt", ["model_0.pt"]
    assert parse_manifest(seal(changed), "p").header.sidecars == ("model_0.pt",)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_manifest_is_refused(body: dict[str, Any], name: str) -> None:
    changed = copy.deepcopy(body)
    HOSTILE[name](changed)
    text = json.dumps(changed).replace('"deep"', "[" * 100_000 + "]" * 100_000)
    with pytest.raises(
        CorruptCheckpointError, match=r"^somewhere: (contradicts itself|not a stager manifest|not valid JSON)"
    ):
        parse_manifest(seal_json(text.encode()), "somewhere")


@pytest.mark.parametrize("body_json", [b"null", b"[]", b"3", b'"stager"', b"{}"])
def test_other_documents_are_refused(body_json: bytes) -> None:
    with pytest.raises(CorruptCheckpointError, match="not a stager manifest"):
        parse_manifest(seal_json(body_json), "p")


def test_newer_version_says_upgrade(body: dict[str, Any]) -> None:
    with pytest.raises(
        CorruptCheckpointError, match="version 2, and this stager reads version 1: install a newer stager"
    ):
        parse_manifest(seal({**body, "version": 2}), "p")


def test_not_a_number_is_no_number(body: dict[str, Any]) -> None:
    text = json.dumps({**body, "created": float("nan")}).encode()
    with pytest.raises(CorruptCheckpointError, match="NaN"):
        parse_manifest(seal_json(text), "p")


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda c: st.lists(c, max_size=4) | st.dictionaries(st.text(max_size=5), c, max_size=4),
    max_leaves=8,
)


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_any_value_put_anywhere_is_accepted_or_refused_and_nothing_else(
    body: dict[str, Any], data: st.DataObject
) -> None:
    changed = copy.deepcopy(body)
    place: Any = changed
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(place[key], (dict, list)) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = data.draw(_JSON)
    try:
        manifest = parse_manifest(seal(changed), "p")
    except CorruptCheckpointError:
        return
    list(manifest.paths())
    assert manifest.nbytes >= 0


def test_a_manifest_of_many_gigabytes_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "step-00000001" / "manifest.json"
    path.parent.mkdir()
    with open(path, "wb") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(CorruptCheckpointError, match="too much"):
        read_manifest(path.parent)


def test_renamed_checkpoint_is_skipped_with_the_reason(run_dir: Path) -> None:
    info = save(run_dir, STATE)
    Path(info.path).rename(run_dir / "step-00000009")
    (run_dir / "step-00000002").mkdir()
    (run_dir / "step-00000003").touch()
    (run_dir / "step-٠٠٠٠٠٠٠٤").mkdir()  # digits, but not ours
    (run_dir / "step-000000005").mkdir()
    committed, skipped = list_checkpoints(run_dir)
    assert committed == []
    assert {s.name: s.reason.partition(": ")[2] for s in skipped} == {
        "step-00000009": "its manifest is of step 1: the directory was renamed",
        "step-00000003": "not a committed checkpoint: it has no manifest [Not a directory]",
        "step-00000002": "not a committed checkpoint: it has no manifest [No such file or directory]",
    }
