"""Ranks per host, as launchers say it."""

from __future__ import annotations

import pytest

from stager.ranks.launch import local_world_size


@pytest.mark.parametrize(("text", "expected"), [("4", 4), ("0", 1), ("", 1), ("four", 1), ("-2", 1)])
def test_torchrun(text: str, expected: int) -> None:
    assert local_world_size({"LOCAL_WORLD_SIZE": text}) == expected


def test_alone() -> None:
    assert local_world_size({}) == 1


def test_mpirun() -> None:
    assert local_world_size({"OMPI_COMM_WORLD_LOCAL_SIZE": "8"}) == 8
    assert local_world_size({"MPI_LOCALNRANKS": "3"}) == 3


@pytest.mark.parametrize(
    ("text", "node", "expected"),
    [("4", "0", 4), ("4(x2),3", "1", 4), ("4(x2),3", "2", 3), ("4(x2),3", "3", 1), ("2,x", "1", 1), ("8", "", 8)],
)
def test_slurm(text: str, node: str, expected: int) -> None:
    environ = {"SLURM_PROCID": "0", "SLURM_NODEID": node, "SLURM_TASKS_PER_NODE": text}
    assert local_world_size(environ) == expected


def test_the_shell_of_a_slurm_allocation_is_no_rank() -> None:
    assert local_world_size({"SLURM_TASKS_PER_NODE": "4"}) == 1


def test_the_step_counts_before_the_allocation() -> None:
    environ = {"SLURM_PROCID": "0", "SLURM_TASKS_PER_NODE": "4", "SLURM_STEP_TASKS_PER_NODE": "2"}
    assert local_world_size(environ) == 2
