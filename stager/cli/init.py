"""``stager init``: a configuration file for this host. The work is in :mod:`stager.planning`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from stager.cli.console import printable, stdout
from stager.cli.state_options import OptimizerName, host_of_options, job_of_options, state_of_options

if TYPE_CHECKING:
    from stager.planning import Host, Need, Place, StateSource


def init(
    file: Annotated[str, typer.Argument(metavar="[FILE]", help="The file to write.")] = "stager.yaml",
    *,
    directory: Annotated[
        str, typer.Option("--dir", metavar="RUN", help="Where checkpoints will go; need not exist yet.")
    ] = "runs",
    state: Annotated[
        str | None,
        typer.Option(
            metavar="PKG.MOD:CALLABLE",
            help="Callable that returns the state, an nn.Module, or (module, optimizer). Runs that code.",
        ),
    ] = None,
    meta: Annotated[bool, typer.Option("--meta", help="Call it on the meta device: no memory for tensors.")] = False,
    params: Annotated[
        str | None, typer.Option(metavar="N", help="Instead of --state: so many parameters: 124000000, 124M, 70B.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of --params: float32, bf16, ...")] = "float32",
    tensors: Annotated[int, typer.Option(min=1, help="Into how many tensors --params are divided.")] = 300,
    optimizer: Annotated[
        OptimizerName | None, typer.Option(help="Optimizer whose state to assume, with --params or a module alone.")
    ] = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Trainers of the job. Default: those of one host.")] = None,
    local_world_size: Annotated[
        int | None, typer.Option(min=1, help="Trainers on one host. Default: LOCAL_WORLD_SIZE, else 1.")
    ] = None,
    shards: Annotated[int, typer.Option(min=1, help="Ranks that each tensor is sharded over, as by FSDP.")] = 1,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory available on a host, e.g. 512GiB; this host's otherwise.")
    ] = None,
    cores: Annotated[int | None, typer.Option(min=1, help="Cores of a host; those usable here otherwise.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE if it exists.")] = False,
) -> None:
    """Write a configuration file for this host, with a comment for every value. With a state, memory is set for it."""
    from stager.config import StagerConfig
    from stager.planning import look_at, propose, settings_file, work_out
    from stager.workers.errors import UsageError

    if state is not None and params is not None:
        raise UsageError("give --state or --params, not both")
    if meta and state is None:
        raise UsageError("--meta needs --state")
    if optimizer is not None and state is None and params is None:
        raise UsageError("--optimizer needs --state or --params")
    if os.path.lexists(file) and not force:
        raise UsageError(f"{file}: exists already; name another file, or replace it with --force")
    job = job_of_options(ranks, local_world_size, shards)
    host = host_of_options(memory, cores)
    place = look_at(directory)
    source = need = None
    if state is not None or params is not None:
        source = state_of_options("--state", state, meta, params, dtype, tensors, optimizer)
        need = work_out(source.state, StagerConfig(), job, host)
    text = settings_file(_introduction(file, host, place, source, need), propose(host, job, place, need))
    _write(file, text, replace=force)
    console = stdout()
    use = f'Checkpointer("{directory}", config="{file}")'
    console.print(f"wrote {printable(file)}; use it with {printable(use)}", markup=False, soft_wrap=True)
    for advice in need.advice if need is not None else ():
        console.print(f"-> {printable(advice)}", markup=False, soft_wrap=True)


def _introduction(file: str, host: Host, place: Place, source: StateSource | None, need: Need | None) -> list[str]:
    """The head of the file: the facts it was written from, and how to use it."""
    from stager.config.sizes import format_bytes

    on = f"a host with {host.num_cores} cores and {format_bytes(host.available_bytes)} of memory available"
    facts = f"Settings of stager, written by `stager init` for {on}, and for checkpoints in {place.path}"
    if source is not None and need is not None:
        size = f"{need.state.num_tensors} tensors, {format_bytes(need.state.tensor_nbytes)}"
        facts += f", of the state {source.name} ({size})"
    lines = [
        f"{printable(facts)}.",
        "Keys with a # before them have their default: remove the # to set one. An unknown key is an error.",
        f"To check the job with this file: stager plan --config {printable(file)} ...; this host: stager doctor",
    ]
    lines += [f"Assumed: {printable(assumed)}." for assumed in (source.assumed if source is not None else ())]
    lines += [f"Note: {printable(advice)}." for advice in (need.advice if need is not None else ())]
    return lines


def _write(file: str, text: str, *, replace: bool) -> None:
    from stager.workers.errors import StorageError

    try:
        with open(file, "w" if replace else "x", encoding="utf-8") as out:
            out.write(text)
    except OSError as error:
        raise StorageError(error.errno, "cannot write the file", file) from error
