"""The pool as users start it: no main module is imported again, so no guard is needed, whatever the program is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stager.workers import PoolOptions, WorkerPool
from tests.pool import tasks

# Run as it stands, with whatever comes after it; prints what must be its whole output.
_SCRIPT = """
import os
from stager.workers import WorkerPool
def in_main(x):
    return x * factor
factor = 2
class Result:
    def __init__(self, value):
        self.value = value
pool = WorkerPool(count=1)
print(pool.submit(in_main, 21).result(), pool.submit(Result, 5).result().value, flush=True)
print(pool.submit(lambda: print("noise", flush=True) or os.getpid()).result() in pool.pids, flush=True)
"""
_OUTPUT = "42 5\nTrue\n"


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    directory = tmp_path / "empty"
    directory.mkdir()
    return directory


def run(arguments: list[str], directory: Path, script: str = "") -> subprocess.CompletedProcess[str]:
    """In ``directory``; with the path of this process, and warnings as errors."""
    return subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        cwd=directory,
        input=script,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )


def test_from_stdin_with_functions_and_classes_of_main_and_close_forgotten(empty: Path) -> None:
    done = run(["-"], empty, _SCRIPT)
    assert (done.returncode, done.stdout, done.stderr) == (0, _OUTPUT, "noise\n")


def test_from_python_c_where_an_exception_ends_the_program_with_work_in_flight(empty: Path) -> None:
    """What was submitted is done before the interpreter ends; the error is the only one that is shown."""
    more = "pool.submit(lambda: open('done', 'w').close()); pool.hand_over(int); raise RuntimeError('primary')"
    done = run(["-c", _SCRIPT + more], empty)
    assert (done.returncode, done.stdout) == (1, _OUTPUT)
    assert done.stderr.startswith("noise\nTraceback") and done.stderr.endswith("RuntimeError: primary\n")
    assert (empty / "done").exists()


def test_from_a_file_where_modules_of_that_name_are_in_the_way_and_stderr_is_closed(empty: Path) -> None:
    """Workers start with ``python -c``, which looks into the current directory first; the trainer does not."""
    (empty.parent / "train.py").write_text(_SCRIPT)
    for name in ("json", "signal", "socket", "threading", "workers", "torch", "psutil"):
        (empty / f"{name}.py").write_text("raise AssertionError(__file__)")
    code = "import os, sys; os.close(2); os.execv(sys.executable, [sys.executable, '../train.py'])"
    done = run(["-P" if sys.version_info >= (3, 11) else "-s", "-c", code], empty)
    assert (done.returncode, done.stdout, done.stderr) == (0, _OUTPUT, "")


def test_environment_priority_and_directory_of_a_worker() -> None:
    options = PoolOptions(nice=3, ionice="idle", env={"FOR_WORKERS": "yes", "CUDA_VISIBLE_DEVICES": ""})

    def look() -> tuple[int, int, str, int]:
        import psutil
        import torch

        me = psutil.Process()
        return me.nice(), int(me.ionice().ioclass), me.cwd(), torch.get_num_threads()

    with WorkerPool(count=1, options=options) as pool:
        environment = json.loads(pool.submit(tasks.environment).result())
        nice = os.getpriority(os.PRIO_PROCESS, 0)
        assert pool.submit(look).result() == (min(19, nice + 3), 3, str(Path.cwd()), 1)
    ours = {"FOR_WORKERS": "yes", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    assert environment == {**os.environ, **ours, **_set_by_torch(environment)}


def _groups_by_session() -> bool:
    """Whether a new session gets a group of its own here: in some containers the file is there and always empty."""
    file = Path("/proc/self/autogroup")
    if not file.exists():
        return False
    found = subprocess.run(["cat", file], start_new_session=True, capture_output=True, text=True, check=False).stdout
    return bool(found) and bool(file.read_text())


@pytest.mark.skipif(not _groups_by_session(), reason="this kernel does not group these processes by session")
def test_niceness_counts_against_the_trainer_where_the_kernel_groups_by_session() -> None:
    with WorkerPool(count=1, options=PoolOptions(nice=7)) as pool:
        group = pool.submit(lambda: Path("/proc/self/autogroup").read_text()).result()
    assert group.split()[-1] == "7" and Path("/proc/self/autogroup").read_text().split()[0] != group.split()[0]


def _set_by_torch(environment: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in os.environ and "TORCH" in name}


def test_noise_of_a_worker_is_on_standard_error_whoever_makes_it(empty: Path) -> None:
    """On descriptors 1 and 2, from Python, from C and from a process that the task starts; more than a pipe holds. The
    channel is a socket of its own."""
    script = (
        "import ctypes, os\n"
        "from stager.workers import WorkerPool\n"
        "def noisy():\n"
        "    libc = ctypes.CDLL(None)\n"
        "    for fd in (1, 2):\n"
        "        os.write(fd, b'N' * 100_000 + b'\\n')\n"
        "        libc.dprintf(fd, b'N%0100000d\\n', 0)\n"
        "    libc.puts(b'N from C, buffered')\n"
        "    libc.fflush(None)\n"
        "    os.system('echo N from a child')\n"
        "    return 5\n"
        "with WorkerPool(count=1) as pool:\n"
        "    print([pool.submit(noisy).result() for _ in range(3)])\n"
    )
    done = run(["-"], empty, script)
    assert (done.returncode, done.stdout) == (0, "[5, 5, 5]\n")
    lines = done.stderr.splitlines()
    assert len(lines) == 3 * 6 and all(line.startswith("N") for line in lines)


_ALL_OF = (
    "import importlib, pkgutil, {package}\n"
    "for info in pkgutil.walk_packages({package}.__path__, '{package}.'):\n"
    "    if not info.name.endswith('__main__'):\n"
    "        importlib.import_module(info.name)\n"
)


def test_workers_never_imports_stager_and_touches_no_cuda(empty: Path) -> None:
    """Every module of it, in a process of its own; torch is made to say when CUDA is asked for anything."""
    script = (
        "import sys, torch\n"
        "def touched(*args): raise AssertionError('CUDA was touched')\n"
        "torch.cuda._lazy_init = touched\n"
        "torch._C._cuda_getDeviceCount = touched\n"
        + _ALL_OF.format(package="stager.workers")
        + "rest = {name for name in sys.modules if name.startswith('stager.')}\n"
        "assert not [name for name in rest if name.split('.')[1] != 'workers'], rest\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    assert run(["-"], empty, script).stderr == ""


@pytest.mark.parametrize("order", ["stager.workers, stager", "stager, stager.workers"])
def test_both_import_orders_work_and_no_worker_has_stager(empty: Path, order: str) -> None:
    script = (
        f"import {order}\n"
        "from stager.workers import WorkerPool\n"
        "with WorkerPool(count=1) as pool:\n"
        "    loaded = pool.submit(lambda: sorted(__import__('sys').modules)).result()\n"
        "assert 'stager.workers.pool.worker_loop' in loaded, loaded\n"
        "rest = {name for name in loaded if name.startswith('stager.')}\n"
        "assert not [name for name in rest if name.split('.')[1] != 'workers'], rest\n"
    )
    assert run(["-"], empty, script).stderr == ""


def test_starting_a_worker_imports_nothing_heavy_before_it_looks_after_itself(empty: Path) -> None:
    """Priority, signals and the orphan watch must not have to wait for the seconds of torch."""
    script = (
        "import sys, stager.workers.pool.worker_main\nassert not {'torch', 'numpy', 'cloudpickle'} & set(sys.modules)\n"
    )
    assert run(["-"], empty, script).stderr == ""
