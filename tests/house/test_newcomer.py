"""What somebody does first: pipe a script in, install the wheel."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[2]

SAVE = """
import torch
from stager import Checkpointer
torch.manual_seed(0)
model = torch.nn.Linear(100, 100)
optimizer = torch.optim.AdamW(model.parameters())
with Checkpointer("runs/first") as ckpt:
    for step in range(3):
        model(torch.randn(8, 100)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        ckpt.save(step, {"model": model, "optimizer": optimizer, "note": "hello"})
torch.save((model.state_dict(), optimizer.state_dict()), "expected.pt")
"""

LOAD = """
import torch
from stager import Checkpointer
model = torch.nn.Linear(100, 100)
optimizer = torch.optim.AdamW(model.parameters())
into = {"model": model, "optimizer": optimizer, "note": ""}
assert Checkpointer("runs/first", read_only=True).load(into=into).step == 2
expected = torch.load("expected.pt")
assert into["note"] == "hello"
assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), expected[0].values()))
for a, b in zip(optimizer.state_dict()["state"].values(), expected[1]["state"].values()):
    assert all(torch.equal(a[k], b[k]) for k in b)
"""


def test_script_without_main_guard_from_stdin_in_an_empty_directory(tmp_path: Path) -> None:
    assert len(SAVE.strip().splitlines()) == 12
    for script in (SAVE, LOAD):
        result = subprocess.run(
            [sys.executable, "-W", "error", "-"],
            input=script,
            text=True,
            cwd=tmp_path,
            capture_output=True,
            check=False,
        )
        assert (result.returncode, result.stdout) == (0, "")
        # Nothing warns. On a slow disk a save may wait for a free buffer for so long that this is told.
        assert [line for line in result.stderr.splitlines() if not line.startswith("waiting for ")] == []


def test_wheel_installs_both_packages_into_an_empty_environment(tmp_path: Path) -> None:
    dist = tmp_path / "dist"
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", dist, ROOT],
        check=True,
        capture_output=True,
        cwd=tmp_path,
    )
    (wheel,) = dist.glob("*.whl")
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    python = venv / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", wheel], check=True)
    # The dependencies (torch is large) come from this environment; stager and workers must come from the wheel.
    purelib = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    (Path(purelib) / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    empty = tmp_path / "empty"
    empty.mkdir()
    script = "import stager.workers; from stager import Checkpointer; print(stager.__file__, stager.workers.__file__)"
    result = subprocess.run([python, "-c", script], check=True, capture_output=True, text=True, cwd=empty)
    assert [line.startswith(str(venv)) for line in result.stdout.split()] == [True, True], result.stdout
    help_text = subprocess.run(
        [venv / "bin" / "stager", "--help"], check=True, capture_output=True, text=True, cwd=empty
    )
    assert all(command in help_text.stdout for command in ("demo", "ls", "inspect", "verify", "doctor"))
    assert not Path(purelib, "workers").exists()  # a name that users' projects have
    typed = [Path(line).parent / "py.typed" for line in result.stdout.split()]
    assert all(path.exists() for path in typed)
