"""Each check of the doctor, shown hosts of all kinds. Nothing here looks at the real one."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from stager.config import StagerConfig, load_config
from stager.doctor import Finding, Status
from stager.doctor.kernel import (
    check_descriptor_passing,
    check_huge_pages,
    check_memfd,
    check_pidfd,
    check_populate_write,
)
from stager.doctor.resources import (
    CoreFacts,
    MemoryFacts,
    ProcessFacts,
    check_cores,
    check_dev_shm,
    check_locked_memory,
    check_memory,
    check_open_files,
    check_processes,
)
from stager.doctor.software import CudaFacts, check_cuda, check_python, check_torch
from stager.doctor.target import (
    Mount,
    ProbeFacts,
    check_filesystem,
    check_free_space,
    check_lock,
    check_write,
    find_mount,
    parse_mountinfo,
)

GIB = 1 << 30
DEFAULTS = StagerConfig()


def assert_is(finding: Finding, status: Status, *words: str) -> None:
    """The status, the words, and: whatever is not ok says what to do."""
    assert finding.status is status, finding
    text = f"{finding.value} | {finding.meaning} | {finding.advice}"
    assert [word for word in words if word not in text] == [], text
    assert finding.meaning
    assert bool(finding.advice) == (status is not Status.OK)


@pytest.mark.parametrize(
    ("version", "platform", "status", "words"),
    [
        ((3, 10, 0), "linux", Status.OK, "3.10.0"),
        ((3, 14, 1), "linux", Status.OK, "3.14.1"),
        ((3, 9, 18), "linux", Status.FAIL, "3.10 or newer"),
        ((3, 12, 1), "darwin", Status.FAIL, "needs Linux"),
    ],
)
def test_python(version: tuple[int, int, int], platform: str, status: Status, words: str) -> None:
    assert_is(check_python(version, platform), status, words)


@pytest.mark.parametrize(
    ("version", "status"),
    [
        ("2.6.0", Status.OK),
        ("2.13.0+cpu", Status.OK),
        ("3.0.0a0+git123", Status.OK),
        ("2.5.1+cu121", Status.FAIL),
        ("1.13.1", Status.FAIL),
        ("unknown", Status.FAIL),
    ],
)
def test_torch(version: str, status: Status) -> None:
    assert_is(check_torch(version), status, version)


def test_torch_that_cannot_be_imported() -> None:
    assert_is(check_torch(None, "libcudart.so.12: cannot open"), Status.FAIL, "libcudart.so.12", "pip install")


@pytest.mark.parametrize(
    ("facts", "status", "words"),
    [
        (CudaFacts(None, None, ()), Status.OK, ["none", "CPU build", "needs no CUDA"]),
        (CudaFacts("CUDA 12.8", None, ()), Status.OK, ["no NVIDIA driver", "CUDA 12.8"]),
        (CudaFacts(None, "550.54", ()), Status.WARN, ["550.54", "CPU build"]),
        (CudaFacts("CUDA 12.8", "470.1", (), "driver too old"), Status.WARN, ["470.1", "driver too old", "nvidia-smi"]),
        (CudaFacts("CUDA 12.8", "570.1", ("H200", "H200")), Status.OK, ["2 x H200", "page-locked"]),
        (CudaFacts("CUDA 12.8", "570.1", ("H200", "A100")), Status.OK, ["H200, A100"]),
        (CudaFacts("ROCm 6.2", None, ("MI300X",)), Status.OK, ["1 x MI300X", "ROCm 6.2", "tensors on ROCm devices"]),
        (
            CudaFacts(None, None, ("xpu", "xpu"), kind="xpu", registers=False),
            Status.OK,
            ["2 x xpu", "tensors on xpu devices", "two page-locked buffers", "use no device"],
        ),
        (CudaFacts(None, None, ("npu",), kind="npu"), Status.OK, ["1 x npu", "arena.pin"]),
    ],
    ids=[
        "no gpu, cpu build",
        "no gpu, cuda build",
        "gpu, cpu build",
        "old driver",
        "two gpus",
        "two kinds",
        "rocm",
        "xpu",
        "a backend that registers",
    ],
)
def test_accelerator(facts: CudaFacts, status: Status, words: list[str]) -> None:
    assert_is(check_cuda(facts), status, *words)
    if facts.kind != "cuda" or "ROCm" in (facts.build or ""):
        assert "CUDA" not in str(check_cuda(facts))  # the words of another maker


@pytest.mark.parametrize(
    ("facts", "status", "words"),
    [
        (CoreFacts(16, 16, None), Status.OK, ["16 of 16", "4 worker processes"]),
        (CoreFacts(64, 16, 2.5), Status.OK, ["3 of 64 (affinity 16, cgroup quota 2.5)", "2 worker processes"]),
        (CoreFacts(64, 64, None, local_world_size=4), Status.OK, ["1 worker processes", "4 trainers"]),
        (CoreFacts(4, 1, None), Status.WARN, ["1 of 4 (affinity 1)", "take turns", "workers.nice"]),
        (CoreFacts(4, 4, 0.5), Status.WARN, ["1 of 4 (cgroup quota 0.5)"]),
    ],
)
def test_cores(facts: CoreFacts, status: Status, words: list[str]) -> None:
    assert_is(check_cores(facts, DEFAULTS), status, *words)


def memory(available: int, limit: int | None = None, headroom: int | None = None, world: int = 1) -> MemoryFacts:
    return MemoryFacts(64 * GIB, available, limit, headroom, world)


@pytest.mark.parametrize(
    ("facts", "limit", "status", "words"),
    [
        (memory(40 * GIB), "75%", Status.OK, ["40.0 GiB available of 64.0 GiB", "30.0 GiB for 2 buffers", "15.0 GiB"]),
        (
            memory(40 * GIB, 8 * GIB, 4 * GIB),
            "50%",
            Status.OK,
            ["4.0 GiB available", "cgroup limit 8.0 GiB", "2.0 GiB for"],
        ),
        (memory(3 * GIB, 80 * GIB, 70 * GIB), "100%", Status.OK, ["3.0 GiB available", "3.0 GiB for"]),
        (memory(40 * GIB, world=4), "100%", Status.OK, ["10.0 GiB for 2 buffers", "5.0 GiB for each trainer"]),
        (memory(1 * GIB), "50%", Status.WARN, ["512.0 MiB for 2 buffers"]),
        (memory(2 * GIB), "8GiB", Status.WARN, ["8.0 GiB for 2 buffers", "out-of-memory", "at most 2.0 GiB"]),
        # A number of bytes is for each trainer: one of these fits, and four do not.
        (
            memory(20 * GIB, world=4),
            "8GiB",
            Status.WARN,
            ["8.0 GiB for 2", "4 trainers", "out-of-memory", "at most 5.0 GiB"],
        ),
        (memory(32 * GIB, world=4), "8GiB", Status.OK, ["8.0 GiB for 2 buffers", "4 trainers share this host"]),
        (memory(40 * GIB), "512MiB", Status.WARN, ["512.0 MiB for 2 buffers", "raise arena.max_host_bytes"]),
    ],
)
def test_memory(facts: MemoryFacts, limit: str, status: Status, words: list[str]) -> None:
    config = load_config({"arena": {"max_host_bytes": limit}}, environ={})
    assert_is(check_memory(facts, config), status, *words)


def test_dev_shm_is_never_a_reason_to_stop() -> None:
    assert_is(check_dev_shm(None), Status.OK, "not mounted", "used for replicas only")
    assert_is(check_dev_shm(64 << 20, 60 << 20), Status.OK, "60.0 MiB free of 64.0 MiB", "DataLoader")
    assert "DataLoader" not in check_dev_shm(8 * GIB, 8 * GIB).meaning


@pytest.mark.parametrize(
    ("soft", "hard", "status"),
    [(None, None, Status.OK), (1024, 4096, Status.OK), (150, 4096, Status.WARN), (30, None, Status.FAIL)],
)
def test_open_files(soft: int | None, hard: int | None, status: Status) -> None:
    finding = check_open_files(soft, hard, DEFAULTS, num_workers=4)
    assert_is(finding, status, "unlimited" if soft is None else str(soft))
    assert ("ulimit -n" in finding.advice) == (status is not Status.OK)
    assert ("hard limit is 4096" in finding.advice) == (status is not Status.OK and hard is not None)


def test_locked_memory_matters_to_an_accelerator_only() -> None:
    assert_is(check_locked_memory(8 << 20, registers=False), Status.OK, "8.0 MiB", "not needed")
    assert_is(check_locked_memory(None, registers=True), Status.OK, "unlimited", "accelerator's driver")


@pytest.mark.parametrize(
    ("facts", "status", "words"),
    [
        (ProcessFacts(None, None, None), Status.OK, ["unlimited"]),
        (ProcessFacts(4096, None, None), Status.OK, ["4096"]),
        (ProcessFacts(50, None, None), Status.WARN, ["50", "EAGAIN", "ulimit -u"]),
        (ProcessFacts(50, None, None, is_root=True), Status.OK, ["not for root"]),
        (ProcessFacts(4096, 100, 90), Status.WARN, ["90 of 100 used in the cgroup", "EAGAIN"]),
        (ProcessFacts(None, 4096, 90), Status.OK, ["90 of 4096"]),
    ],
)
def test_processes(facts: ProcessFacts, status: Status, words: list[str]) -> None:
    assert_is(check_processes(facts, num_workers=2), status, *words)


@pytest.mark.parametrize("check", [check_memfd, check_descriptor_passing, check_pidfd])
def test_what_stager_cannot_do_without(check: Callable[[str | None], Finding]) -> None:
    assert_is(check(None), Status.OK, "works")
    assert_is(check("fails: Function not implemented"), Status.FAIL, "Function not implemented", "seccomp")


def test_missing_populate_write_is_slow_not_fatal() -> None:
    assert_is(check_populate_write(None), Status.OK)
    assert_is(check_populate_write("fails: Invalid argument"), Status.WARN, "Invalid argument", "Linux 5.14")


@pytest.mark.parametrize(
    ("text", "value", "words"),
    [
        ("always within_size advise [never] deny force", "never", "small pages"),
        ("always [within_size] advise never deny force", "within_size", "huge pages"),
        ("[always] within_size advise never deny force", "always", "huge pages"),
        ("", "not available", "small pages"),
        (None, "not available", "small pages"),
    ],
)
def test_huge_pages(text: str | None, value: str, words: str) -> None:
    assert_is(check_huge_pages(text), Status.OK, value, words)


MOUNTINFO = """\
22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard
31 27 0:40 / /data rw,relatime shared:7 master:2 - nfs4 server:/export rw,vers=4.2
32 31 0:41 / /data/fast rw,relatime - xfs /dev/nvme0n1 rw
33 27 0:42 / /mnt/with\\040space\\134 ro,relatime - ext4 /dev/vdb ro
34 27 0:43 / /mnt/sealed rw,relatime - ext4 /dev/vdc ro
35 31 0:44 / /data/fast rw,relatime - tmpfs over rw
not a line of it
36 27 0:45 / /bad - short
"""


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/work/run", Mount("/", "ext4", "/dev/vda", False)),
        ("/data", Mount("/data", "nfs4", "server:/export", False)),
        ("/data/slow/run", Mount("/data", "nfs4", "server:/export", False)),
        ("/database/run", Mount("/", "ext4", "/dev/vda", False)),
        ("/data/fast/run", Mount("/data/fast", "tmpfs", "over", False)),
        ("/mnt/with space\\/run", Mount("/mnt/with space\\", "ext4", "/dev/vdb", True)),
        ("/mnt/sealed", Mount("/mnt/sealed", "ext4", "/dev/vdc", True)),
    ],
)
def test_mount_of_a_path(path: str, expected: Mount) -> None:
    assert find_mount(parse_mountinfo(MOUNTINFO), path) == expected


@pytest.mark.parametrize(
    ("fstype", "status", "words"),
    [
        ("ext4", Status.OK, "local"),
        ("xfs", Status.OK, "local"),
        ("nfs4", Status.OK, "network"),
        ("lustre", Status.OK, "network"),
        ("tmpfs", Status.WARN, "in memory"),
        ("overlay", Status.WARN, "container"),
        ("fuse.s3fs", Status.WARN, "FUSE"),
        ("fuse", Status.WARN, "FUSE"),
        ("fuseblk", Status.WARN, "FUSE"),
        ("virtiofs", Status.WARN, "another system"),
        ("newfs", Status.OK, "write test"),
    ],
)
def test_filesystem(fstype: str, status: Status, words: str) -> None:
    assert_is(check_filesystem(Mount("/data", fstype, "src", False)), status, f"{fstype} from src on /data", words)


def test_read_only_or_unknown_filesystem() -> None:
    assert_is(check_filesystem(Mount("/", "ext4", "/dev/vda", True)), Status.FAIL, "read-only")
    assert_is(check_filesystem(None), Status.WARN, "unknown")


@pytest.mark.parametrize(
    ("free", "inodes", "status"),
    [
        (100 * GIB, 10**6, Status.OK),
        (100 * GIB, None, Status.OK),
        (GIB // 2, 10**6, Status.WARN),
        (1 << 20, 10**6, Status.FAIL),
        (100 * GIB, 500, Status.WARN),
        (100 * GIB, 3, Status.FAIL),
    ],
)
def test_free_space(free: int, inodes: int | None, status: Status) -> None:
    assert_is(check_free_space(free, 200 * GIB, inodes), status, "of 200.0 GiB")


def probed(secs: float = 0.5, problem: str | None = None, lock: str | None = None, exists: bool = True) -> ProbeFacts:
    return ProbeFacts("/data", exists, 64_000_000, secs, problem, lock)


def test_write() -> None:
    assert_is(check_write(probed()), Status.OK, "128 MB/s", "78 s")
    assert_is(check_write(probed(secs=64.0)), Status.WARN, "1 MB/s", "167 min", "less often")
    assert_is(check_write(probed(exists=False)), Status.OK, "does not exist yet")
    assert_is(
        check_write(probed(problem="cannot write: No space left on device")), Status.FAIL, "No space left", "/data"
    )


def test_lock() -> None:
    works = check_lock(probed())
    fails = check_lock(probed(lock="fails: Function not implemented"))
    assert works is not None
    assert fails is not None
    assert_is(works, Status.OK)
    assert_is(fails, Status.FAIL, "Function not implemented", "-o flock")
    assert check_lock(probed(problem="cannot create a file: Permission denied")) is None
