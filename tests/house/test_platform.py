"""Where stager cannot run, its import says so in one sentence."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from stager.workers.platform_check import check_platform


def test_here() -> None:
    check_platform(sys.platform)


@pytest.mark.parametrize(
    ("platform", "name"), [("darwin", "macOS"), ("win32", "Windows"), ("cygwin", "Cygwin"), ("freebsd14", "freebsd14")]
)
def test_other_systems(platform: str, name: str) -> None:
    with pytest.raises(ImportError, match=f"stager needs Linux .*this is {name}; run it on a Linux host") as raised:
        check_platform(platform)
    assert "\n" not in str(raised.value)


def test_no_proc(tmp_path: Path) -> None:
    with pytest.raises(ImportError, match=rf"stager needs {tmp_path}, and it is not mounted here; mount it"):
        check_platform("linux", str(tmp_path))


def test_import_asks_first() -> None:
    """Before anything that needs Linux: also ``import stager.workers`` comes through ``stager/__init__.py``."""
    lines = (Path(__file__).parents[2] / "stager" / "__init__.py").read_text().splitlines()
    call = lines.index(next(line for line in lines if line.startswith("check_platform(sys.platform)")))
    assert [line for line in lines[:call] if line.startswith(("from stager", "import fcntl"))] == [
        "from stager.workers.platform_check import check_platform"
    ]
