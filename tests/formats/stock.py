"""What stock PyTorch and safetensors read, in a process in which stager cannot be imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

READERS = {
    "dcp": """
import torch.distributed.checkpoint.format_utils as f
f.dcp_to_torch_save(path, out)
""",
    "torch": """
state = torch.load(path + "/state.pt", weights_only=True, mmap=True)
again = torch.load(path + "/state.pt", weights_only=True)
assert str(state) == str(again)
torch.save(state, out)
""",
    "safetensors": """
import glob
from safetensors import safe_open
from safetensors.torch import load_file
state, tied = {}, {}
for file in glob.glob(path + "/*.safetensors"):
    state |= {name: tensor.clone() for name, tensor in load_file(file).items()}
    tied |= safe_open(file, "pt").metadata()
assert tied.pop("format") == "pt"
torch.save({"tensors": state, "tied": tied}, out)
""",
}

_PROLOGUE = """
import sys, warnings
for name in ("stager", "workers", "tests"):
    sys.modules[name] = None  # importing it is an error now
warnings.simplefilter("ignore")  # torch.distributed's, about a missing process group
path, out = sys.argv[1:]
import torch
"""


def read_stock(kind: str, checkpoint: str, elsewhere: Path) -> Any:
    """The state as the format's own library reads it; of safetensors ``tensors`` by name, and ``tied``."""
    out = elsewhere / "read.pt"
    command = [sys.executable, "-P", "-c", _PROLOGUE + READERS[kind], checkpoint, str(out)]
    if sys.version_info < (3, 11):
        command.remove("-P")
    subprocess.run(command, check=True, cwd=elsewhere)
    return torch.load(out, weights_only=True)
