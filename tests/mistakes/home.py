"""Where mistakes are made: a directory with runs and files, made anew for each mistake, and the names that programs see.

    runs/gpt            steps 100, 200, 300: a model, an optimizer, progress
    runs/ddp            step 100, of a model in a wrapper: its names begin with ``module.``
    model.pt            the model's weights, by torch.save
    weights.safetensors the same, by safetensors
    dcp                 the same, by dcp.save
    stager.yaml         a configuration
    train.py            the user's program, with build()

``ckpt`` is an open Checkpointer of ``runs/live``, which has steps 1 and 2. It is shared by mistakes that leave it as it is.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn

import stager
from stager import Checkpointer, SaveHandle
from tests.waiting import wait_until

_CHANGES_IT = re.compile(r"guard\(optimizer\)|on_preemption|close\(|callback")
_STEPS = (1, 2)  # of the shared Checkpointer's run
_TRAIN = "import torch\n\n\ndef build():\n    return torch.nn.Linear(4, 4)\n\n\nvalue = 3\n"


class Wrapped(nn.Module):
    """As DistributedDataParallel: the module is its attribute ``module``."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class Home:
    """The directory, and the shared Checkpointer. Changes the current directory for as long as it is open."""

    def __init__(self, directory: Path) -> None:
        self._template, self.directory, self._live = directory / "template", directory / "home", directory / "live"
        self._ckpt: _Recording | None = None
        self.handles: list[SaveHandle] = []
        self._template.mkdir(parents=True)
        os.chdir(self._template)
        self._fill()

    def _fill(self) -> None:
        names = make_names()
        with Checkpointer("runs/gpt") as ckpt:
            for step in (100, 200, 300):
                ckpt.save(step, names["state"])
        with Checkpointer("runs/ddp") as ckpt:
            ckpt.save(100, {"model": Wrapped(names["model"])})
        weights = names["model"].state_dict()
        torch.save(weights, "model.pt")
        save_file(weights, "weights.safetensors")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch: there is no process group
            dcp.save({"model": weights}, checkpoint_id="dcp")
        Path("stager.yaml").write_text("arena:\n  buffers: 3\n")
        Path("train.py").write_text(_TRAIN)

    @contextmanager
    def names_for(self, code: str) -> Iterator[dict[str, Any]]:
        """The names for one mistake, in a fresh directory."""
        shutil.rmtree(self.directory, ignore_errors=True)
        shutil.copytree(self._template, self.directory)
        os.chdir(self.directory)
        self.handles = []
        names = make_names()
        if re.search(r"\bckpt\b", code) and "ckpt = " not in code and "as ckpt" not in code:
            names["ckpt"] = self._shared(names["state"])
        try:
            yield names
        finally:
            if _CHANGES_IT.search(code):
                self.close()
            for made in {*self._live.glob("step-*")} - {self._live / f"step-{step:08d}" for step in _STEPS}:
                shutil.rmtree(made)  # the next mistake finds the same checkpoints

    def _shared(self, state: dict[str, Any]) -> Checkpointer:
        if self._ckpt is None:
            os.makedirs(self.directory / "runs", exist_ok=True)
            shutil.rmtree(self._live, ignore_errors=True)
            self._ckpt = _Recording(self._live)
            self._ckpt.home = self
            for step in _STEPS:
                Checkpointer.save(self._ckpt, step, state).upload_completion.result()
        return self._ckpt

    def wait_until_judged(self) -> None:
        """Wait until what the shared Checkpointer says of saves that have ended is said."""
        if self._ckpt is not None and self.handles:
            errors = self._ckpt._run._errors

            def are_judged() -> bool:
                with errors._lock:
                    return not errors._in_order

            wait_until(are_judged)

    def close(self) -> None:
        """Close the shared Checkpointer; the next mistake that needs one gets a new one."""
        if self._ckpt is not None:
            ckpt, self._ckpt = self._ckpt, None
            ckpt.close()

    def normal(self, text: str) -> str:
        """Without what differs from run to run and from machine to machine."""
        for path, name in (
            (self._live, "/home/me/runs/live"),
            (self.directory, "/home/me"),
            (self._template, "/home/me"),
        ):
            text = text.replace(str(path), name)
        text = re.sub(r"\b(pid|process|worker) \d+", r"\1 N", text)
        text = re.sub(r"\b0x[0-9a-f]{6,}", "0x...", text)
        text = re.sub(r"\.(partial|removing|damaged|unfinished)-[0-9a-f]+", r".\1-...", text)
        text = re.sub(r"\d+(\.\d+)?( \w*B)? (are|is) (available|free)", r"N\2 \3 \4", text)
        text = re.sub(r"\b\d+\.\d+ (s|ms)\b", r"N \1", text)
        text = re.sub(r" \(\d+ in a row\)", "", text)  # of the shared Checkpointer
        text = re.sub(r"\n *For further information visit https://errors.pydantic.dev\S*", "", text)
        return text.replace(str(Path(stager.__file__).parents[1]), "/usr/lib/python3")


class _Recording(Checkpointer):
    """Keeps the handles of its saves, so that each background error is read by the mistake that made it."""

    home: Home

    @functools.wraps(Checkpointer.save)  # messages name it as Checkpointer.save()
    def save(self, *arguments: Any, **options: Any) -> SaveHandle:
        handle = super().save(*arguments, **options)
        self.home.handles.append(handle)
        return handle


_Recording.__name__ = _Recording.__qualname__ = "Checkpointer"


def make_names() -> dict[str, Any]:
    """What a program sees."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    state = {"model": model, "optimizer": optimizer, "progress": {"epoch": 3}}
    names: dict[str, Any] = {name: value for name, value in vars(stager).items() if not name.startswith("_")}
    names.update({name: getattr(stager, name) for name in stager.__all__})
    return {
        **names,
        "__name__": "__main__",
        "Path": Path,
        "Wrapped": Wrapped,
        "dcp": dcp,
        "dist": dist,
        "model": model,
        "nn": nn,
        "np": np,
        "optimizer": optimizer,
        "os": os,
        "shutil": shutil,
        "stager": stager,
        "state": state,
        "torch": torch,
    }
