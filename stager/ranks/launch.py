"""How many ranks share this host, as the launcher says in the environment.

torchrun sets ``LOCAL_WORLD_SIZE``, Open MPI ``OMPI_COMM_WORLD_LOCAL_SIZE``, MPICH and Intel MPI ``MPI_LOCALNRANKS``, Slurm
``SLURM_STEP_TASKS_PER_NODE`` or ``SLURM_TASKS_PER_NODE`` (``4`` or ``4(x2),3``: for the nodes in turn).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_SIZES = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
_SLURM_SIZES = ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE")
_RUN = re.compile(r"([0-9]{1,6})(?:\(x([0-9]{1,6})\))?")


def local_world_size(environ: Mapping[str, str]) -> int:
    """How many ranks of this job run on this host; 1 if no launcher says so."""
    for name in _SIZES:
        text = environ.get(name, "")
        if text.isdigit() and int(text) > 0:
            return int(text)
    if "SLURM_PROCID" in environ:  # otherwise this is the shell of an allocation, and not a task of a step
        for name in _SLURM_SIZES:
            size = _of_node(environ.get(name, ""), environ.get("SLURM_NODEID", "0"))
            if size is not None:
                return size
    return 1


def _of_node(text: str, node: str) -> int | None:
    """The entry for a node's number: of ``4(x2),3``, nodes 0 and 1 have 4, node 2 has 3."""
    number = int(node) if node.isdigit() else 0
    for entry in text.split(","):
        match = _RUN.fullmatch(entry.strip())
        if match is None:
            return None
        if number < int(match[2] or 1):
            return max(1, int(match[1]))
        number -= int(match[2] or 1)
    return None
