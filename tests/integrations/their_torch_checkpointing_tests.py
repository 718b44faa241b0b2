"""torch_checkpointing's own tests, run with stager's classes in the place of its own.

    python tests/integrations/their_torch_checkpointing_tests.py CHECKOUT test_staging.py ...

CHECKOUT is one of https://github.com/meta-pytorch/torch_checkpointing, of which only the tests are taken. They test the
package that is installed, with two names changed before they import it: ``DefaultStager`` is ``StagerCheckpointStager``,
and ``LocalFileSystemStorageConfig`` is a ``StagerStorageConfig``. They need ``expecttest``. Further arguments are pytest's.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch_checkpointing
import torch_checkpointing.builder
import torch_checkpointing.checkpoint_manager
import torch_checkpointing.staging
import torch_checkpointing.storage.filesystem

from stager.integrations.torch_checkpointing import StagerCheckpointStager, StagerStorageConfig


@dataclass
class Config(StagerStorageConfig):
    """stager's configuration, with the field of theirs."""

    use_direct_io: bool = True


def main(checkout: Path, arguments: list[str]) -> int:
    """Run the tests; returns pytest's exit code."""
    for module in (torch_checkpointing, torch_checkpointing.builder, torch_checkpointing.staging):
        module.DefaultStager = StagerCheckpointStager
    for module in (
        torch_checkpointing.builder,
        torch_checkpointing.checkpoint_manager,
        torch_checkpointing.storage.filesystem,
    ):
        module.LocalFileSystemStorageConfig = Config
    # A copy of the tests alone: subprocesses would import the package from the checkout, and not the one that is installed.
    with tempfile.TemporaryDirectory() as directory:
        shutil.copytree(checkout / "tests", f"{directory}/tests")
        os.chdir(f"{directory}/tests")
        return int(pytest.main(["-p", "no:cacheprovider", "-W", "ignore", "--rootdir", directory, *arguments]))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve(), sys.argv[2:]))
