"""``make lint`` fails when a layer is broken: shown on a copy of the sources in which one is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

BREACHES = {
    "workers imports stager": ("workers/pool/channel.py", "import stager.config.sizes"),
    "the pool imports memory": ("workers/pool/channel.py", "import stager.workers.memory.pages"),
    "the layout imports the commit": (
        "workers/checkpoint/layout/layout.py",
        "import stager.workers.checkpoint.commit.commit",
    ),
    "the core imports torch's names": ("stager/loading/loader.py", "import stager.torch_api.storage"),
    "the engine imports a tool": ("stager/arena/arena.py", "import stager.doctor"),
    "two files import each other": ("stager/config/sizes.py", "import stager.config.models"),
    "only for type checking": (
        "workers/errors.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import stager.workers.pool.pool",
    ),
}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for folder in ("stager", "workers"):
        shutil.copytree(ROOT / folder, tmp_path / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def lint(root: Path) -> subprocess.CompletedProcess[str]:
    """The command behind ``make lint``, on the sources in ``root``."""
    program = "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"
    return subprocess.run(
        [sys.executable, "-c", program, "--no-cache"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_layers_of_the_sources_are_kept(copy: Path) -> None:
    result = lint(copy)
    assert result.returncode == 0, result.stdout
    assert "0 broken" in result.stdout
    assert "lint-imports" in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("breach", BREACHES)
def test_a_layer_that_is_broken_fails_and_is_named(copy: Path, breach: str) -> None:
    file, statement = BREACHES[breach]
    path = copy / file
    lines = path.read_text().split("\n")
    future = lines.index("from __future__ import annotations")
    path.write_text("\n".join([*lines[: future + 1], statement, *lines[future + 1 :]]))
    result = lint(copy)
    assert result.returncode == 1, result.stdout
    module = file.removesuffix(".py").replace("/", ".")
    name = module.split(".")[-1]
    assert "BROKEN" in result.stdout
    assert name in result.stdout.split("Broken contracts")[1]
