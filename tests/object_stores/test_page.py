"""The script of docs/object-stores.md, against a server."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from stager import Checkpointer, verify
from tests.house.code_blocks import ROOT

RUN = """
import sys
sys.path.insert(0, sys.argv[1])
from tests.house.code_blocks import run_document
run_document("docs/object-stores.md", "")
"""


@pytest.mark.parametrize("server", ["ministack"], indirect=True)
def test_the_script_of_the_page_runs_and_goes_on_from_its_last_checkpoint(run_url: str, tmp_path: Path) -> None:
    for _ in range(2):
        ended = subprocess.run(
            [sys.executable, "-c", RUN, str(ROOT)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=150,
            check=False,
        )
        assert ended.returncode == 0, ended.stderr
    with Checkpointer("s3://bucket/runs/gpt", read_only=True) as ckpt:
        assert ckpt.latest_step() == 900
    assert verify("s3://bucket/runs/gpt/step-00000900").ok
